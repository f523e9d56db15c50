"""The vocabulary of placement: what is asked for, what there is, what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class ExpertDemand:
    """What is known of an expert's load."""

    id: str
    mass: float
    """Traffic expected, in any unit that all experts share (a share, engine seconds per second);
    at first the cluster's share of the corpus."""
    rank: int
    """LoRA rank of its adapter."""
    bytes: int = 0
    """Size of its adapter in memory; 0: it does not matter."""


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker can hold."""

    id: str
    slots: int | None
    """Adapters the engine keeps on its device; none: it makes as many as it is given."""
    memory_bytes: int | None = None
    """Memory for adapters, on the host and past it; none: there is enough."""
    weight: float = 1.0
    """Speed, as a multiple of the others': a worker of weight 2 takes twice the load."""
    rank: int | None = None
    """LoRA rank its engine is sized for, which it computes at and above which it refuses; none:
    the highest that it is given."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How demands become homes."""

    max_replicas: int = 1
    """Homes of one expert at the most."""
    gain: float = 0.1
    """Share by which the busiest worker's load must fall for homes to be moved for balance."""
    slack: float = 0.02
    """Share by which a worker may be busier than its fair load and still be given an expert by
    hash; past it the lightest worker is taken."""
    replica_share: float = 0.5
    """Share of one worker's fair load that a home carries before the expert gets another home."""
    hysteresis: float = 0.2
    """Share by which demand must be past the point where the number of homes changes."""
    rank_cost: float = 0.01
    """Compute that one rank adds to a request, as a share of the base's. Slowed down by a factor
    of 4 at rank 256 in vLLM issue 14435, which is 0.012 per rank."""


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


def moved(before: Placement, after: Placement) -> int:
    """Homes that an expert has now and had not before: adapters that workers have to load."""
    return sum(
        len(set(homes) - set(before.homes.get(expert, ()))) for expert, homes in after.homes.items()
    )
