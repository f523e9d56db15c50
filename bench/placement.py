"""Placement against its rivals, in a simulation that drives the code that serves.

`server.placement` plans and plans again; the choice among homes is the gateway's, the less loaded
of two. The GPUs are simulated (bench/_gpus.py), so is the traffic (bench/_traffic.py): Zipf, one
day in the length of a run, and flash crowds. Rivals get the same requests on the same GPUs.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol
from zlib import crc32

import numpy as np
from _gpus import Costs, Gpus
from _report import Report, parser
from _traffic import WINDOW_S, ZIPF, Pattern, patterns

from deploy.output import note
from server.placement import (
    ExpertDemand,
    Placement,
    Policy,
    WorkerCapacity,
    expected,
    moved,
    plan_placement,
    replan,
)

SERVICE_S = 2.0
"""Mean seconds of a request in the engine: 100 tokens at 20 ms."""
UTILISATION = 0.5
"""Share of all lanes that requests would keep busy if no adapter were ever loaded."""
REBALANCE_S = 30.0
MOVE_EVERY_S = 0.5
"""Seconds between two adapters that one worker loads because they now live there."""


@dataclass(frozen=True)
class Scale:
    """How much is simulated."""

    experts: int
    gpus: int
    seconds: float
    warm_up_s: float
    """Seconds at the beginning that are not measured."""
    max_replicas: int

    @property
    def rate(self) -> float:
        """Requests per second."""
        return UTILISATION * self.gpus * Costs().lanes / SERVICE_S

    @property
    def host_slots(self) -> int:
        """Adapters in one GPU's host memory: twice its share, as `serving.host_slots` has it."""
        return 2 * -(-self.experts // self.gpus)


FULL = Scale(experts=5_000, gpus=64, seconds=1_800, warm_up_s=300, max_replicas=16)
QUICK = Scale(experts=500, gpus=8, seconds=1_800, warm_up_s=300, max_replicas=4)


class Chooser(Protocol):
    """A policy: which GPU a request goes to."""

    moves: int

    def choose(self, expert: int) -> int:
        """The GPU for a request."""
        ...

    def tick(self, now: float, asked: Sequence[int]) -> None:
        """A window has passed, in which these experts were asked for."""
        ...


class Hashed:
    """Static hashing: one home for ever, whatever is asked."""

    moves = 0

    def __init__(self, scale: Scale, gpus: Gpus) -> None:
        self._homes = [crc32(f"expert-{e:04d}".encode()) % scale.gpus for e in range(scale.experts)]
        for expert, gpu in enumerate(self._homes):
            gpus.fill(gpu, expert)

    def choose(self, expert: int) -> int:
        return self._homes[expert]

    def tick(self, now: float, asked: Sequence[int]) -> None:
        pass


class LeastLoaded:
    """Any worker: the one with the fewest requests in flight, which loads what it lacks."""

    moves = 0

    def __init__(self, scale: Scale, gpus: Gpus) -> None:
        self._in_flight = gpus.in_flight
        self._random = random.Random(0)

    def choose(self, expert: int) -> int:
        load = self._in_flight
        least = min(load)
        if load.count(least) == 1:
            return load.index(least)
        return self._random.choice([gpu for gpu, n in enumerate(load) if n == least])

    def tick(self, now: float, asked: Sequence[int]) -> None:
        pass


class Anywhere(LeastLoaded):
    """LRU anywhere: the least loaded worker that has the adapter in a slot, unless another worker
    is less busy by more than `SLACK` requests; that one then loads it and forgets what it used
    least recently. Every request knows the slots and queues of all workers."""

    SLACK = 4

    def __init__(self, scale: Scale, gpus: Gpus) -> None:
        super().__init__(scale, gpus)
        self._holders = gpus.holders

    def choose(self, expert: int) -> int:
        holders = self._holders[expert]
        if holders:
            load = self._in_flight
            best = min(holders, key=load.__getitem__)
            if load[best] <= min(load) + self.SLACK:
                return best
        return super().choose(expert)


class Planned:
    """Ours: homes by `plan_placement`, kept up with demand by `replan`."""

    def __init__(self, scale: Scale, gpus: Gpus) -> None:
        self._gpus = gpus
        self._policy = Policy(max_replicas=scale.max_replicas)
        self._workers = [WorkerCapacity(f"{g}", gpus.costs.slots) for g in range(scale.gpus)]
        self._names = [f"expert-{expert:04d}" for expert in range(scale.experts)]
        self._demand: dict[str, float] = {}  # nothing is known of the traffic before it comes
        self._asked = np.zeros(scale.experts)
        self._next = REBALANCE_S
        self._random = random.Random(0)
        self.moves = 0
        self._placement = plan_placement(self._experts(), self._workers, self._policy)
        self._homes = self._numbers(self._placement)
        self._pending: list[tuple[float, int, int]] = []
        for expert, homes in enumerate(self._homes):
            for gpu in homes:
                gpus.fill(gpu, expert)

    def choose(self, expert: int) -> int:
        homes = self._homes[expert]
        if len(homes) == 1:
            return homes[0]
        one, other = self._random.sample(homes, 2)
        load = self._gpus.in_flight
        return one if load[one] <= load[other] else other

    def tick(self, now: float, asked: Sequence[int]) -> None:
        self._asked += np.bincount(np.asarray(asked, dtype=np.int64), minlength=len(self._asked))
        due = [move for move in self._pending if move[0] <= now]
        self._pending = [move for move in self._pending if move[0] > now]
        for _, gpu, expert in due:
            self._gpus.prepare(now, gpu, expert)
            self._homes[expert] = [*self._homes[expert], gpu]
        self._forget({expert for _, _, expert in due})
        if now >= self._next and not self._pending:
            self._next = now + REBALANCE_S
            self._replan(now)

    def _replan(self, now: float) -> None:
        newest = dict(zip(self._names, (self._asked / REBALANCE_S).tolist(), strict=True))
        self._demand = expected(self._demand, newest, len(self._workers))
        self._asked[:] = 0
        after = replan(self._placement, self._experts(), self._workers, self._policy)
        self.moves += moved(self._placement, after)
        busy = [0] * len(self._workers)
        for expert, homes in enumerate(self._numbers(after)):
            for gpu in set(homes) - set(self._homes[expert]):
                self._pending.append((now + MOVE_EVERY_S * busy[gpu], gpu, expert))
                busy[gpu] += 1
        self._placement = after
        self._forget(set(range(len(self._homes))) - {expert for _, _, expert in self._pending})

    def _forget(self, experts: set[int]) -> None:
        """Experts whose new homes have all loaded them leave the old ones."""
        waiting = {expert for _, _, expert in self._pending}
        for expert in experts - waiting:
            homes = self._placement.homes[self._names[expert]]
            self._homes[expert] = [int(home) for home in homes]

    def _experts(self) -> list[ExpertDemand]:
        return [ExpertDemand(name, self._demand.get(name, 1.0), 16) for name in self._names]

    def _numbers(self, placement: Placement) -> list[list[int]]:
        return [[int(home) for home in placement.homes[name]] for name in self._names]


POLICIES = {
    "introvert": Planned,
    "static_hashing": Hashed,
    "lru_anywhere": Anywhere,
    "least_loaded": LeastLoaded,
}
RIVALS = [name for name in POLICIES if name != "introvert"]


@dataclass(frozen=True)
class Outcome:
    """What a policy made of a pattern."""

    wait_p50_ms: float
    wait_p99_ms: float
    cold_percent: float
    """Adapter loads per 100 requests: those that requests waited for, and those of moves."""
    moves_per_hour: float
    max_over_mean_load: float


def simulate(pattern: Pattern, policy: str, scale: Scale, costs: Costs) -> Outcome:
    """Run one pattern under one policy."""
    gpus = Gpus(scale.gpus, scale.experts, scale.host_slots, costs)
    chooser: Chooser = POLICIES[policy](scale, gpus)
    asked, measured, cold, moves = 0, 0, 0, 0
    served = [0.0] * scale.gpus
    for number, window in enumerate(pattern.windows(scale.seconds, SERVICE_S, seed=1)):
        if number * WINDOW_S == scale.warm_up_s:
            measured, cold, moves, asked = len(gpus.waits), gpus.cold, chooser.moves, 0
            served = list(gpus.served)
        for now, expert, service in zip(window.times, window.experts, window.services, strict=True):
            gpus.advance(now)
            gpus.arrive(now, chooser.choose(expert), expert, service)
        asked += len(window.times)
        end = (number + 1) * WINDOW_S
        gpus.advance(end)
        chooser.tick(end, window.experts)
    gpus.advance(float("inf"))
    waits = np.frombuffer(gpus.waits)[measured:]
    loads = np.array(gpus.served) - np.array(served)
    moves = chooser.moves - moves
    return Outcome(
        wait_p50_ms=1e3 * float(np.percentile(waits, 50)),
        wait_p99_ms=1e3 * float(np.percentile(waits, 99)),
        cold_percent=100 * (gpus.cold - cold + moves) / asked,
        moves_per_hour=moves * 3600 / (scale.seconds - scale.warm_up_s),
        max_over_mean_load=float(loads.max() / loads.mean()),
    )


UNITS = {
    "wait_p50_ms": "ms",
    "wait_p99_ms": "ms",
    "cold_percent": "per 100 requests",
    "moves_per_hour": "1/h",
    "max_over_mean_load": "",
}


def compare(report: Report, pattern: Pattern, scale: Scale, costs: Costs) -> None:
    """Every policy under one pattern; ours is held against the best rival: whose 99th percentile
    of the wait is the least."""
    outcomes = {policy: simulate(pattern, policy, scale, costs) for policy in reversed(POLICIES)}
    best = min((outcomes[rival] for rival in RIVALS), key=lambda rival: rival.wait_p99_ms)
    goals = {
        "wait_p99_ms": f"<= {best.wait_p99_ms:.4f}",
        "cold_percent": f"< {best.cold_percent:.4f}",
    }
    for policy in POLICIES:
        for figure, value in asdict(outcomes[policy]).items():
            goal = goals.get(figure) if policy == "introvert" else None
            report.add(f"{pattern.name}_{policy}_{figure}", value, UNITS[figure], goal)


def measure_planning(report: Report, scale: Scale) -> None:
    """Seconds that planning takes, and planning again after the loss of a worker."""
    masses = patterns(scale.experts, 1.0, seed=0)[0].demand(0.0).tolist()
    experts = [ExpertDemand(f"expert-{e:04d}", mass, 16) for e, mass in enumerate(masses)]
    workers = [WorkerCapacity(f"worker-{g}", Costs().slots) for g in range(scale.gpus)]
    policy = Policy(max_replicas=scale.max_replicas)
    began = time.perf_counter()
    placement = plan_placement(experts, workers, policy)
    planned = time.perf_counter()
    replan(placement, experts, workers[1:], policy)
    report.add("plan_s", planned - began, "s", "<= 1")
    report.add("replan_s", time.perf_counter() - planned, "s", "<= 1")


def main() -> int:
    """Simulate and report."""
    arguments = parser(__doc__ or "").parse_args()
    scale, costs = QUICK if arguments.quick else FULL, Costs()
    report = Report("placement", conditions=asdict(scale) | asdict(costs))
    report.conditions |= {
        "planning": "homes planned without any knowledge, then by measured demand",
        "requests_per_s": scale.rate,
        "service_s": SERVICE_S,
        "utilisation_without_loads": UTILISATION,
        "host_slots": scale.host_slots,
        "zipf": ZIPF,
        "rebalance_s": REBALANCE_S,
        "wait": "seconds until the answer's end beyond the request's own service: queue, loads, "
        "and stalls by others' loads",
        "simulated": True,
    }
    measure_planning(report, scale)
    for pattern in patterns(scale.experts, scale.rate, seed=0):
        began = time.monotonic()
        compare(report, pattern, scale, costs)
        note(f"  {pattern.name}: {time.monotonic() - began:.0f} s")
    return report.close(arguments.report)


if __name__ == "__main__":
    sys.exit(main())
