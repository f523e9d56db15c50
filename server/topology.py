"""Nodes and config to worker specs. Pure.

Knows nothing of Ray: whoever calls lists the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from configs.schema import ServingConfig
from server.errors import TopologyError


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster."""

    id: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker to be: where it runs and what it holds."""

    id: str
    """`worker-0`, numbered over the nodes in the order of their addresses."""
    node_id: str
    address: str
    """Of the node; the engine listens on it."""
    gpus: int
    """GPUs, and the engine's tensor-parallel size; 0: the engine computes on its cores."""
    cpus: int
    cores: tuple[int, ...]
    """Without GPUs: places in the node's list of usable cores that are this worker's alone."""


def plan_workers(nodes: Sequence[Node], serving: ServingConfig) -> list[WorkerSpec]:
    """Lay the workers over the nodes, evenly, none of them across two.

    `auto` GPUs are 1 where the cluster has any, else 0; `auto` workers are as many as fit.

    Raises:
        TopologyError: the cluster has no room for what is asked.
    """
    ordered = sorted(nodes, key=lambda node: (node.address, node.id))
    gpus = _gpus_per_worker(ordered, serving)
    room = [_room(node, gpus, serving.cpus_per_worker) for node in ordered]
    wanted = sum(room) if serving.workers == "auto" else serving.workers
    if wanted == 0 or wanted > sum(room):
        raise _no_room(ordered, sum(room), wanted, gpus, serving)
    taken = _spread(room, wanted)
    specs: list[WorkerSpec] = []
    for node, number in zip(ordered, taken, strict=True):
        for place in range(number):
            specs.append(_spec(len(specs), node, gpus, serving.cpus_per_worker, place))
    return specs


def replan_workers(
    current: Sequence[WorkerSpec], nodes: Sequence[Node], serving: ServingConfig
) -> list[WorkerSpec]:
    """Who works after nodes came or went: workers on living nodes stay, others take their numbers.

    As many as are configured, or with `auto` as many as fit the nodes that are there; fewer where
    there is no room, in the hope of nodes to come.
    """
    ordered = sorted(nodes, key=lambda node: (node.address, node.id))
    alive = {node.id for node in ordered}
    specs = [spec for spec in current if spec.node_id in alive]
    gpus = specs[0].gpus if specs else _gpus_per_worker(ordered, serving)
    # a node that offers less than before, or more workers than it should have, loses nobody
    room = [
        max(0, _room(node, gpus, serving.cpus_per_worker) - _count(specs, node)) for node in ordered
    ]
    wanted = sum(room) if serving.workers == "auto" else serving.workers - len(specs)
    taken = _spread(room, min(max(wanted, 0), sum(room)))
    for node, more in zip(ordered, taken, strict=True):
        for _ in range(more):
            number = _first_free({int(spec.id.rpartition("-")[2]) for spec in specs})
            specs.append(
                _spec(number, node, gpus, serving.cpus_per_worker, _free_place(specs, node))
            )
    return sorted(specs, key=lambda spec: int(spec.id.rpartition("-")[2]))


def _spec(number: int, node: Node, gpus: int, cpus: int, place: int) -> WorkerSpec:
    first = place * cpus
    return WorkerSpec(
        id=f"worker-{number}",
        node_id=node.id,
        address=node.address,
        gpus=gpus,
        cpus=cpus,
        cores=() if gpus else tuple(range(first, first + cpus)),
    )


def _count(specs: Sequence[WorkerSpec], node: Node) -> int:
    return sum(spec.node_id == node.id for spec in specs)


def _free_place(specs: Sequence[WorkerSpec], node: Node) -> int:
    """The first core set of a node that no worker has."""
    taken = {spec.cores[0] // spec.cpus for spec in specs if spec.node_id == node.id and spec.cores}
    return _first_free(taken)


def _first_free(taken: set[int]) -> int:
    return next(number for number in count() if number not in taken)


def _gpus_per_worker(nodes: Sequence[Node], serving: ServingConfig) -> int:
    if serving.gpus_per_worker == "auto":
        return 1 if any(node.gpus for node in nodes) else 0
    return serving.gpus_per_worker


def _room(node: Node, gpus: int, cpus: int) -> int:
    """Workers that fit on a node."""
    by_cpu = node.cpus // cpus
    return min(by_cpu, node.gpus // gpus) if gpus else by_cpu


def _spread(room: Sequence[int], wanted: int) -> list[int]:
    """Workers per node: each next one goes to the node that has most room left."""
    taken = [0] * len(room)
    for _ in range(wanted):
        emptiest = max(range(len(room)), key=lambda index: (room[index] - taken[index], -index))
        taken[emptiest] += 1
    return taken


def _no_room(
    nodes: Sequence[Node], room: int, wanted: int, gpus: int, serving: ServingConfig
) -> TopologyError:
    has = "; ".join(f"{node.address}: {node.cpus} cores, {node.gpus} GPUs" for node in nodes)
    return TopologyError(
        f"{max(wanted, 1)} worker(s) of {gpus} GPU(s) and {serving.cpus_per_worker} core(s) each "
        f"do not fit the cluster, which has room for {room} ({has or 'no nodes'}); lower "
        "serving.workers, serving.gpus_per_worker or serving.cpus_per_worker, or add nodes"
    )
