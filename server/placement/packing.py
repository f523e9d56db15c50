"""A placement in the making: who is where, and what every worker carries.

Experts and workers are numbers here: experts by falling load, workers by id, so that the smaller
number goes first and nothing depends on the order of what was passed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from server.placement.lanes import lanes_of
from server.placement.rendezvous import orders, scores
from server.placement.types import ExpertDemand, Placement, Policy, WorkerCapacity

PRIOR = 0.05
"""Share of the traffic that is expected to be spread over all experts evenly, whatever was
measured: an expert that nobody has asked for yet is not one that nobody will ask for."""

CROWDING = 2.0
"""Experts on a worker at the most, as a multiple of an even share, where slots are a cache."""

EPSILON = 1e-9


@dataclass(frozen=True)
class Task:
    """What is to be placed where, in the order of the numbers."""

    experts: Sequence[ExpertDemand]
    workers: Sequence[WorkerCapacity]
    policy: Policy

    @classmethod
    def of(
        cls, experts: Sequence[ExpertDemand], workers: Sequence[WorkerCapacity], policy: Policy
    ) -> Task:
        """The task, whatever the order of what is passed."""
        return cls(
            experts=sorted(experts, key=lambda e: (-e.mass, -e.rank, e.id)),
            workers=sorted(workers, key=lambda w: w.id),
            policy=policy,
        )

    @cached_property
    def loads(self) -> list[float]:
        """Share of the requests of every expert."""
        total, count = sum(e.mass for e in self.experts), len(self.experts)
        if total <= 0:
            return [1 / count] * count
        return [(1 - PRIOR) * e.mass / total + PRIOR / count for e in self.experts]

    @cached_property
    def fair(self) -> float:
        """Burden of every worker, if all were equally busy and none computed at a rank that its
        experts do not need."""
        least = min(worker.rank or 0 for worker in self.workers)
        burden = sum(
            load * self.cost(max(expert.rank, least))
            for expert, load in zip(self.experts, self.loads, strict=True)
        )
        return burden / sum(worker.weight for worker in self.workers)

    @cached_property
    def highest(self) -> float:
        """The highest rank that any worker takes."""
        return max(math.inf if w.rank is None else w.rank for w in self.workers)

    @cached_property
    def cached(self) -> bool:
        """Whether slots are a cache: there are fewer than experts."""
        return self._slots < len(self.experts)

    @cached_property
    def spare_slots(self) -> float:
        """Slots for homes past the first ones."""
        return math.inf if self.cached else self._slots - len(self.experts)

    @cached_property
    def spare_bytes(self) -> float:
        """Memory for homes past the first ones, such that these fit however they are laid."""
        sizes = [expert.bytes for expert in self.experts]
        memory = sum(
            math.inf if w.memory_bytes is None else w.memory_bytes - max(sizes)
            for w in self.workers
        )
        return memory - sum(sizes)

    @cached_property
    def _slots(self) -> float:
        return sum(math.inf if w.slots is None else w.slots for w in self.workers)

    @cached_property
    def reserves(self) -> list[float]:
        """Burden that each worker keeps free, while there are slots, for experts without one.

        These are kept together on a part of the workers: there they load each other out of the
        slots, and the experts of all others stay in theirs. The part is such that nobody holds
        more than `CROWDING` times as many experts as if all held the same number.
        """
        rest = len(self.experts) - self._slots
        left = [0.0] * len(self.workers)
        if rest <= 0:
            return left
        even = CROWDING * len(self.experts) / sum(w.weight for w in self.workers)
        room = [max(0.0, even * w.weight - (w.slots or 0)) for w in self.workers]
        enough = 0.0
        for worker, places in enumerate(room):
            left[worker] = min(places, rest - enough)
            enough += left[worker]
        load = sum(self.loads[int(self._slots) :]) * self.fair / sum(self.loads)
        burden = load * sum(w.weight for w in self.workers)
        return [
            burden * share / enough / w.weight for share, w in zip(left, self.workers, strict=True)
        ]

    @cached_property
    def scores(self) -> npt.NDArray[np.float64]:
        """Rendezvous scores, `[expert, worker]`."""
        return scores(
            [e.id for e in self.experts],
            [w.id for w in self.workers],
            [w.weight for w in self.workers],
        )

    @cached_property
    def orders(self) -> list[list[int]]:
        """Workers for every expert, best first."""
        return orders(self.scores)

    def cost(self, rank: int) -> float:
        """Compute of a request on an engine of this rank, in units of the base's."""
        return 1 + self.policy.rank_cost * rank


class Packing:
    """Homes of experts, and what they mean for the workers."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.homes: list[list[int]] = [[] for _ in task.experts]
        self.on: list[set[int]] = [set() for _ in task.workers]
        self._mass = [0.0] * len(task.workers)
        self._bytes = [0] * len(task.workers)
        self._ranks: list[Counter[int]] = [Counter() for _ in task.workers]
        self._with_room = sum(map(self.free, range(len(task.workers))))
        self.lanes = lanes_of(task.experts, task.loads, task.workers, task.cost)

    def add(self, expert: int, worker: int) -> None:
        """Give an expert a home more."""
        self._share(expert, len(self.homes[expert]) + 1)
        self.homes[expert].append(worker)
        self._with_room -= self.free(worker)
        self.on[worker].add(expert)
        self._with_room += self.free(worker)
        self._mass[worker] += self.share(expert)
        self._bytes[worker] += self.task.experts[expert].bytes
        self._ranks[worker][self.task.experts[expert].rank] += 1

    def drop(self, expert: int, worker: int) -> None:
        """Take a home from an expert."""
        self._mass[worker] -= self.share(expert)
        self.homes[expert].remove(worker)
        self._with_room -= self.free(worker)
        self.on[worker].remove(expert)
        self._with_room += self.free(worker)
        self._bytes[worker] -= self.task.experts[expert].bytes
        ranks = self._ranks[worker]
        ranks[self.task.experts[expert].rank] -= 1
        ranks += Counter()  # forgets the ranks that nobody has any more
        if self.homes[expert]:
            self._share(expert, len(self.homes[expert]), before=len(self.homes[expert]) + 1)

    def move(self, expert: int, source: int, target: int) -> None:
        """Give an expert another home for one that it has, in the same place of its order."""
        place = self.homes[expert].index(source)
        self.drop(expert, source)
        self.add(expert, target)
        self.homes[expert].insert(place, self.homes[expert].pop())

    def share(self, expert: int) -> float:
        """Load of an expert on each of its homes."""
        return self.task.loads[expert] / max(1, len(self.homes[expert]))

    def burden(self, worker: int, extra: float = 0.0, rank: int = 0) -> float:
        """How busy a worker is, or would be with an expert more: load times cost, by weight.

        vLLM computes at the engine's rank whichever adapter a request is for
        (vllm-project/vllm pull request 22782), so one expert of high rank makes all its
        neighbours dearer.
        """
        capacity = self.task.workers[worker]
        highest = max(self._ranks[worker], default=0) if capacity.rank is None else capacity.rank
        cost = self.task.cost(max(highest, rank))
        return (self._mass[worker] + extra) * cost / capacity.weight

    def busiest(self) -> float:
        """Burden of the busiest worker."""
        return max(map(self.burden, range(len(self.on))))

    def refuses(self, expert: int, worker: int) -> bool:
        """Whether a worker's engine is sized for a lower rank than an expert's, and others not."""
        sized = self.task.workers[worker].rank
        return sized is not None and sized < self.task.experts[expert].rank <= self.task.highest

    def free(self, worker: int) -> bool:
        """Whether a worker has a slot left."""
        slots = self.task.workers[worker].slots
        return slots is None or len(self.on[worker]) < slots

    @property
    def any_free(self) -> bool:
        """Whether any worker has a slot left."""
        return self._with_room > 0

    def over(self, worker: int) -> bool:
        """Whether a worker has more experts than slots."""
        slots = self.task.workers[worker].slots
        return slots is not None and len(self.on[worker]) > slots

    def overflow(self, worker: int, extra: int = 0) -> int:
        """Bytes past a worker's memory budget, with an expert of `extra` bytes more."""
        budget = self.task.workers[worker].memory_bytes
        return 0 if budget is None else max(0, self._bytes[worker] + extra - budget)

    def best(self, expert: int, homes: int) -> int:
        """The worker that is to take an expert that will have so many homes.

        First of all its engine takes it, then it fits into memory, then there is a free slot, then
        its rank does not make others dearer, then the worker is not busier than it should be; of
        those that are, the lightest; of those that are not, the one the hash prefers.
        """
        demand = self.task.experts[expert]
        load = self.task.loads[expert] / homes
        cap = self.task.fair * (1 + self.task.policy.slack)
        lane = self.lanes.get(demand.rank)
        ideal = (False, 0, not self.any_free, False, 0.0)
        found, found_key = -1, ideal
        for worker in self.task.orders[expert]:
            if worker in self.homes[expert]:
                continue
            after = self.burden(worker, load, demand.rank)
            if self.any_free:
                after += self.task.reserves[worker]
            key = (
                self.refuses(expert, worker),
                self.overflow(worker, demand.bytes),
                not self.free(worker),
                lane is not None and worker not in lane,
                after if after > cap + EPSILON else 0.0,
            )
            if found < 0 or key < found_key:
                found, found_key = worker, key
                if key == ideal:
                    break
        return found

    def admits(self, expert: int, worker: int) -> bool:
        """Whether a worker can take an expert more: by rank and by memory, whatever its slots."""
        size = self.task.experts[expert].bytes
        return not (self.refuses(expert, worker) or self.overflow(worker, size))

    def placement(self) -> Placement:
        """The homes by name."""
        names = [worker.id for worker in self.task.workers]
        return Placement(
            {
                demand.id: tuple(names[worker] for worker in homes)
                for demand, homes in zip(self.task.experts, self.homes, strict=True)
            }
        )

    def _share(self, expert: int, homes: int, before: int | None = None) -> None:
        """Spread an expert's load over another number of homes than so far."""
        load = self.task.loads[expert]
        known = self.homes[expert]
        change = load / homes - load / (before or len(known)) if known else 0.0
        for worker in known:
            self._mass[worker] += change
