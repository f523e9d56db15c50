"""Planning: who keeps a home, who needs one, who gets another.

Every expert gets a home whatever the slots: past them an engine keeps adapters in host memory and
its slots become a cache, so slots and memory steer the placement but never turn an expert away.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from server.errors import ServingConfigError
from server.placement.balance import balance, settle, welcome
from server.placement.packing import Packing, Task
from server.placement.replicas import homes_needed
from server.placement.types import ExpertDemand, Placement, Policy, WorkerCapacity

ROUNDS = 8
"""Times a fresh plan is planned again at the most, until nothing moves any more."""

DEFAULT = Policy()


def plan_placement(
    experts: Iterable[ExpertDemand], workers: Iterable[WorkerCapacity], policy: Policy = DEFAULT
) -> Placement:
    """Give every expert its homes: the loads balanced, within slots and memory.

    Heaviest first (Graham's LPT rule, SIAM J. Appl. Math. 17(2), 1969), each onto the worker that
    rendezvous hashing prefers among those that are not yet busier than they should be (bounded
    loads: Mirrokni, Thorup and Zadimoghaddam, SODA 2018), or else onto the lightest.
    The result depends on what is passed, not on its order, and `replan` leaves it as it is.

    Raises:
        ServingConfigError: there is no worker, or an id appears twice.
    """
    task = _task(experts, workers, policy)
    placement = Placement({})
    for _ in range(ROUNDS):
        before, placement = placement, _step(task, placement)
        if placement == before:
            break
    return placement


def replan(
    previous: Placement,
    experts: Iterable[ExpertDemand],
    workers: Iterable[WorkerCapacity],
    policy: Policy = DEFAULT,
) -> Placement:
    """Plan again after workers or experts came or went, or demand changed; move what must move.

    - A worker that is gone: its experts get other homes, nobody else moves.
    - A worker that came: it takes experts that put it first, up to its fair load.
    - Neither: experts get homes more or less where their demand has changed enough, and move for
      balance where the busiest worker's load falls by `policy.gain`.

    Raises:
        ServingConfigError: there is no worker, or an id appears twice.
    """
    return _step(_task(experts, workers, policy), previous)


def _task(
    experts: Iterable[ExpertDemand], workers: Iterable[WorkerCapacity], policy: Policy
) -> Task:
    task = Task.of(list(experts), list(workers), policy)
    _check_ids([worker.id for worker in task.workers], [expert.id for expert in task.experts])
    return task


def _step(task: Task, previous: Placement) -> Placement:
    if not task.experts:
        return Placement({})
    packing = Packing(task)
    had = [len(previous.homes.get(expert.id, ())) for expert in task.experts]
    _keep(packing, previous)
    bereft = {e for e, homes in enumerate(packing.homes) if len(homes) < had[e]}
    joined = bool(previous.homes) and not bereft and welcome(packing)
    members_changed = bool(bereft) or joined
    needs = [
        homes_needed(load, task.fair, had[e], len(task.workers), task.policy)
        if not members_changed or e in bereft or not had[e]
        else had[e]
        for e, load in enumerate(task.loads)
    ]
    granted = _grant(packing, needs)
    _trim(packing, granted)
    settle(packing)
    _place(packing, granted)
    if not members_changed:
        balance(packing)
    return packing.placement()


def _keep(packing: Packing, previous: Placement) -> None:
    """Everybody stays where they are, if that is still there."""
    numbers = {worker.id: number for number, worker in enumerate(packing.task.workers)}
    for number, expert in enumerate(packing.task.experts):
        for home in dict.fromkeys(previous.homes.get(expert.id, ())):
            if home in numbers and not packing.refuses(number, numbers[home]):
                packing.add(number, numbers[home])


def _grant(packing: Packing, needs: Sequence[int]) -> list[int]:
    """Homes that experts get: as many as they need, if all experts then still have room.

    Where slots or memory are scarce, those who have a home more keep it before others get one.
    Where not even one home each fits the slots they are a cache anyway, in which busy experts stay.
    """
    task = packing.task
    slots, memory = task.spare_slots, task.spare_bytes
    granted = [1] * len(needs)
    had = [len(homes) for homes in packing.homes]
    for wanted in ([min(*pair) for pair in zip(needs, had, strict=True)], needs):
        waiting = [(-task.loads[e] / granted[e], e) for e, n in enumerate(wanted) if n > granted[e]]
        heapq.heapify(waiting)
        while waiting:
            _, expert = heapq.heappop(waiting)
            size = task.experts[expert].bytes
            if slots < 1 or memory < size:
                continue
            granted[expert] += 1
            slots, memory = slots - 1, memory - size
            if wanted[expert] > granted[expert]:
                heapq.heappush(waiting, (-task.loads[expert] / granted[expert], expert))
    return granted


def _trim(packing: Packing, granted: Sequence[int]) -> None:
    """Take homes from those who have too many, on the busiest of their workers first."""
    for expert, homes in enumerate(packing.homes):
        while len(homes) > granted[expert]:
            packing.drop(expert, max(homes, key=lambda w: (packing.burden(w), w)))


def _place(packing: Packing, granted: Sequence[int]) -> None:
    """Give homes to those who have too few, the heaviest first."""
    task = packing.task
    lacking = [e for e, homes in enumerate(packing.homes) if len(homes) < granted[e]]
    for expert in sorted(lacking, key=lambda e: (-task.loads[e] / granted[e], e)):
        homes = packing.homes[expert]
        while len(homes) < granted[expert]:
            worker = packing.best(expert, granted[expert])
            room = packing.admits(expert, worker) and (task.cached or packing.free(worker))
            if homes and not room:
                break  # a home more is not worth a neighbour's slot
            packing.add(expert, worker)


def _check_ids(workers: list[str], experts: list[str]) -> None:
    if not workers:
        raise ServingConfigError("there is no worker to place experts on; set serving.workers to 1")
    for ids, noun in ((workers, "worker"), (experts, "expert")):
        if len(set(ids)) != len(ids):
            twice = next(name for name in sorted(ids) if ids.count(name) > 1)
            raise ServingConfigError(f"{noun} {twice} appears twice; publish the bundle again")
