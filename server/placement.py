"""Experts to workers. Pure: demands and capacities in, homes out.

Every expert gets a home whatever the slots: past them an engine keeps adapters in host memory and
its slots become a cache, so slots steer the placement but never turn an expert away.

Knows nothing of Ray, of engines, or of where the measured mass comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from server.errors import ServingConfigError


@dataclass(frozen=True, slots=True)
class ExpertDemand:
    """What is known of an expert's load."""

    id: str
    mass: float
    """Share of the traffic expected, in [0, 1]; at first the cluster's share of the corpus."""
    rank: int
    """LoRA rank of its adapter."""


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker can hold."""

    id: str
    slots: int | None
    """Adapters the engine keeps on its device; none: it makes as many as it is given."""


@dataclass(frozen=True)
class Placement:
    """Where every expert lives."""

    homes: Mapping[str, tuple[str, ...]]
    """Worker ids by expert id, at least one each, the first one preferred."""

    @cached_property
    def _experts_by_worker(self) -> dict[str, tuple[str, ...]]:
        grouped: dict[str, list[str]] = {}
        for expert in sorted(self.homes):
            for worker in self.homes[expert]:
                grouped.setdefault(worker, []).append(expert)
        return {worker: tuple(experts) for worker, experts in grouped.items()}

    def experts_of(self, worker: str) -> tuple[str, ...]:
        """Ids of the experts that live on a worker, sorted."""
        return self._experts_by_worker.get(worker, ())


@dataclass
class _Load:
    """A worker while experts are being handed out."""

    capacity: WorkerCapacity
    mass: float = 0.0
    experts: int = 0

    @property
    def full(self) -> bool:
        return self.capacity.slots is not None and self.experts >= self.capacity.slots

    def rank_for_next(self) -> tuple[bool, float, int, str]:
        """The least of these takes the next expert: free slots first, then the lightest."""
        return (self.full, self.mass, self.experts, self.capacity.id)

    def add(self, expert: ExpertDemand) -> None:
        self.mass += expert.mass
        self.experts += 1


def plan_placement(experts: Iterable[ExpertDemand], workers: Iterable[WorkerCapacity]) -> Placement:
    """Give every expert one home, the masses balanced within the slots.

    Heaviest first onto the lightest worker (Graham's LPT rule, SIAM J. Appl. Math. 17(2), 1969).
    The result depends on what is passed, not on its order.

    Raises:
        ServingConfigError: there is no worker, or an id appears twice.
    """
    return replan(Placement({}), experts, workers)


def replan(
    previous: Placement, experts: Iterable[ExpertDemand], workers: Iterable[WorkerCapacity]
) -> Placement:
    """Plan again after workers or experts came or went, moving no expert without need.

    An expert stays where it is while its worker is there with a slot for it; the heaviest keep
    their slots first. The others are placed as by `plan_placement`, onto what is there.

    Raises:
        ServingConfigError: there is no worker, or an id appears twice.
    """
    capacities = sorted(workers, key=lambda worker: worker.id)
    ordered = sorted(experts, key=lambda expert: (-expert.mass, -expert.rank, expert.id))
    _check_ids([worker.id for worker in capacities], [expert.id for expert in ordered])
    loads = {worker.id: _Load(worker) for worker in capacities}
    homes: dict[str, tuple[str, ...]] = {}
    homeless: list[ExpertDemand] = []
    for expert in ordered:
        kept = next((home for home in previous.homes.get(expert.id, ()) if home in loads), None)
        if kept is None or loads[kept].full:
            homeless.append(expert)
        else:
            homes[expert.id] = (kept,)
            loads[kept].add(expert)
    for expert in homeless:
        target = min(loads.values(), key=_Load.rank_for_next)
        homes[expert.id] = (target.capacity.id,)
        target.add(expert)
    return Placement(homes)


def _check_ids(workers: list[str], experts: list[str]) -> None:
    if not workers:
        raise ServingConfigError("there is no worker to place experts on; set serving.workers to 1")
    for ids, noun in ((workers, "worker"), (experts, "expert")):
        if len(set(ids)) != len(ids):
            twice = next(name for name in sorted(ids) if ids.count(name) > 1)
            raise ServingConfigError(f"{noun} {twice} appears twice; publish the bundle again")
