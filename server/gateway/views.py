"""What a model name means in one bundle: worked out once per table, so that a request looks it up.

A request takes one view at its beginning and keeps it, so that its router, its expert and the
version that it answers with are of one bundle, whatever is published meanwhile. This module knows
nothing of HTTP, of load, and of how a text is routed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import msgspec

from router.types import Route
from server.gateway.admission import Lane
from server.gateway.residency import Residency
from server.table import ExpertHome, RoutingTable, WorkerEntry


@dataclass(frozen=True, slots=True)
class Home:
    """A ready worker."""

    worker: str
    url: str
    lane: Lane = field(compare=False, repr=False)
    residency: Residency | None = field(default=None, compare=False, repr=False)
    """The slots of its engine; none where all of its experts have one."""
    salt: int = field(default=0, compare=False, repr=False)
    """What its name contributes to the choice of a conversation's usual replica."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name means now: an expert or the base, and its ready homes."""

    served_name: str
    """The name in the engine and in the answer's `model`."""
    expert: str | None
    """The expert's id; none for the base."""
    version: str | None
    homes: tuple[Home, ...]
    """As of the table that the view was made from."""
    model_json: msgspec.Raw
    """`served_name` as JSON, to be put into a body."""
    refused_by: tuple[str, ...] = ()
    """The workers that were to hold the expert, if every one of them refused it."""

    @property
    def label(self) -> str:
        """The expert's id, or `base`."""
        return self.expert or "base"

    @property
    def lane_name(self) -> str | None:
        """Under which it waits for a slot; none for the base, which needs none."""
        return self.served_name if self.expert else None


@dataclass(frozen=True, slots=True)
class View:
    """One bundle as the gateway serves it."""

    bundle: str
    """Its version."""
    base: Target
    by_name: Mapping[str, Target]
    """Everything by every name it has: experts by id and by served name, and the base."""
    by_expert: Mapping[str, Target]

    def routed(self, expert: str | None) -> Target:
        """Where a routed request goes: to its expert, or to the base where that is not served or
        was refused by all of its workers."""
        target = self.base if expert is None else self.by_expert.get(expert, self.base)
        return self.base if target.refused_by else target

    def allowed(self, route: Route, may_ask: Callable[[str], bool]) -> Target | None:
        """Where a routed request goes of somebody who may not ask everything: its expert, or the
        best other candidate, or the base; none: it may ask none of them.

        Args:
            route: of the request.
            may_ask: whether an expert, by its id, or `base` may be asked.
        """
        target = self.routed(route.expert)
        if may_ask(target.label):
            return target
        for candidate in () if route.abstained else route.top:
            other = self.by_expert.get(candidate.expert)
            if other is not None and not other.refused_by and may_ask(other.label):
                return other
        return self.base if may_ask(self.base.label) else None


@dataclass(frozen=True, slots=True)
class Views:
    """A table's views, and who holds what."""

    served: View
    canary: View | None
    canary_share: float
    homes: Mapping[str, tuple[Home, ...]]
    """Ready homes by served name, of the base as well."""
    placed: Mapping[str, Sequence[str]]
    """Ids of the workers that are to hold an expert, by its served name."""

    def placed_on(self, target: Target) -> Sequence[str]:
        """Ids of the workers that are to hold a target's expert; none if it is of no bundle now."""
        return self.placed.get(target.served_name, ())


def views_of(table: RoutingTable, make_home: Callable[[WorkerEntry], Home]) -> Views:
    """The views of a table, in one pass over it: asking it once per expert would be quadratic in
    thousands of experts."""
    ready = []
    holding: dict[str, list[Home]] = defaultdict(list)
    for worker in table.workers:
        if worker.state == "ready" and worker.url is not None:
            home = make_home(worker)
            ready.append(home)
            for served_name in worker.experts:
                holding[served_name].append(home)
    homes = {name: tuple(found) for name, found in holding.items()}
    homes[table.base_name] = tuple(ready)
    served = _view(table, table.bundle, table.experts, homes)
    placed = {e.served_name: e.workers for e in table.experts}
    canary = table.canary
    if canary is None:
        return Views(served, None, 0.0, homes, placed)
    placed |= {e.served_name: e.workers for e in canary.experts if e.served_name not in placed}
    theirs = table.model_copy(update={"experts": canary.experts})
    beside = _view(theirs, canary.bundle, canary.experts, homes)
    return Views(served, beside, canary.share, homes, placed)


def salt_of(worker: str) -> int:
    """A number that sets a worker apart in the choice of usual replicas."""
    return crc32(worker.encode())


def _view(
    table: RoutingTable,
    bundle: str,
    experts: Sequence[ExpertHome],
    homes: Mapping[str, tuple[Home, ...]],
) -> View:
    refused = table.refused_experts()
    base = _target(table.base_name, None, None, homes)
    by_expert = {
        e.id: _target(
            e.served_name,
            e.id,
            e.version,
            homes,
            refused_by=tuple(e.workers) if e.served_name in refused else (),
        )
        for e in experts
    }
    by_name = {target.served_name: target for target in by_expert.values()}
    by_name |= by_expert
    by_name[table.base_name] = base
    return View(bundle, base, by_name, by_expert)


def _target(
    served_name: str,
    expert: str | None,
    version: str | None,
    homes: Mapping[str, tuple[Home, ...]],
    refused_by: tuple[str, ...] = (),
) -> Target:
    return Target(
        served_name=served_name,
        expert=expert,
        version=version,
        homes=homes.get(served_name, ()),
        model_json=msgspec.Raw(msgspec.json.encode(served_name)),
        refused_by=refused_by,
    )
