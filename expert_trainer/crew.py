"""Where actors live: alive nodes and wanted actors to places.

Pure; knows nothing of Ray, of jobs, or of what an actor does at its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

MAX_FAILED_STARTS = 3
"""Actors that fail to start on a node, one after the other, before the node is left out."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    host: str
    """Name of its machine; the nodes of a test cluster share one."""
    address: str
    """`HOST:PORT`, which no other node has."""
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one actor holds of its node."""

    cpus: int
    gpus: float
    """A fraction: several actors share a GPU; no actor has a part of two."""

    def room(self, node: Node) -> int:
        """Actors that fit on a node."""
        by_cpu = node.cpus // self.cpus
        if self.gpus == 0:
            return by_cpu
        if self.gpus < 1:
            return min(by_cpu, node.gpus * int(1 / self.gpus + 1e-9))
        return min(by_cpu, int(node.gpus / self.gpus + 1e-9))


@dataclass(frozen=True, slots=True)
class Place:
    """Where one actor lives."""

    node: str
    """The node's id."""
    slot: int
    """Number of the place on its node."""
    first_core: int | None
    """The first of its cores among those of its machine; none: on a GPU, not pinned to cores."""


class Starts:
    """Which nodes actors start on, and which are left out."""

    def __init__(self) -> None:
        """All nodes are trusted."""
        self._failed: Counter[str] = Counter()
        self._left_out: dict[str, Exception] = {}

    def succeeded(self, node: str) -> None:
        """An actor has started on a node."""
        self._failed[node] = 0

    def failed(self, node: str, cause: Exception) -> bool:
        """An actor has not; returns whether that made the node one that is left out."""
        self._failed[node] += 1
        if self._failed[node] < MAX_FAILED_STARTS or node in self._left_out:
            return False
        self._left_out[node] = cause
        return True

    def usable(self, nodes: Sequence[Node]) -> list[Node]:
        """Those of the nodes that are not left out."""
        return [node for node in nodes if node.id not in self._left_out]

    def cause(self, nodes: Sequence[Node]) -> Exception | None:
        """Why the last of these nodes is left out; none: all of them are usable."""
        causes = [self._left_out[node.id] for node in nodes if node.id in self._left_out]
        return causes[-1] if causes else None


def reconcile(
    nodes: Sequence[Node], taken: Collection[Place], share: Share, wanted: int
) -> list[Place]:
    """Places to fill, so that `wanted` actors live on the nodes, as far as there is room.

    Each next place is on the node that has most room left. Cores are counted by machine: actors
    of nodes on one host get different ones, and those of a vanished node are used again.

    Args:
        nodes: those on which actors may be started.
        taken: the places of all living actors; those on other nodes count as actors, but take no
            room here.
        share: what each actor holds.
        wanted: actors altogether, those at taken places included.
    """
    slots = {node.id: {place.slot for place in taken if place.node == node.id} for node in nodes}
    hosts = {node.id: node.host for node in nodes}
    cores: dict[str, set[int]] = {node.host: set() for node in nodes}
    for place in taken:
        if place.node in hosts and place.first_core is not None:
            cores[hosts[place.node]].add(place.first_core)
    room = {node.id: share.room(node) - len(slots[node.id]) for node in nodes}
    added: list[Place] = []
    ordered = sorted(nodes, key=lambda node: (node.address, node.id))
    while len(taken) + len(added) < wanted:
        node = max(ordered, key=lambda node: room[node.id], default=None)
        if node is None or room[node.id] <= 0:
            break
        slot = _lowest_free(slots[node.id], 1)
        first_core = None if share.gpus else _lowest_free(cores[node.host], share.cpus)
        slots[node.id].add(slot)
        if first_core is not None:
            cores[node.host].add(first_core)
        room[node.id] -= 1
        added.append(Place(node.id, slot, first_core))
    return added


def _lowest_free(taken: Collection[int], step: int) -> int:
    """The lowest multiple of `step` that is not taken."""
    number = 0
    while number in taken:
        number += step
    return number
