"""Moving homes that exist: into slots that are free, onto workers that came, off busy ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from server.placement.packing import EPSILON, Packing

TRIES = 8
"""Experts of the busiest worker that are looked at for one move."""


def settle(packing: Packing) -> None:
    """Move experts off workers whose memory or slots they exceed, if others have room for them.

    The lightest move, so that the heaviest keep their slots.
    """
    for worker in range(len(packing.on)):
        if packing.overflow(worker):
            _make_room(packing, worker)
        if packing.over(worker) and packing.any_free:
            _free_slots(packing, worker)


def _make_room(packing: Packing, worker: int) -> None:
    for expert in sorted(packing.on[worker], reverse=True):
        size = packing.task.experts[expert].bytes
        if not packing.overflow(worker):
            return
        homes = len(packing.homes[expert])
        if not size:
            continue
        if homes > 1:
            packing.drop(expert, worker)
        elif len(packing.on) > 1:
            target = packing.best(expert, homes)
            if packing.admits(expert, target):
                packing.move(expert, worker, target)


def _free_slots(packing: Packing, worker: int) -> None:
    for expert in sorted(packing.on[worker], reverse=True):
        homes = len(packing.homes[expert])
        if not (packing.over(worker) and packing.any_free):
            return
        if homes == len(packing.on):
            continue
        target = packing.best(expert, homes)
        if packing.free(target) and packing.admits(expert, target):
            packing.move(expert, worker, target)


def welcome(packing: Packing) -> bool:
    """Let workers that have nobody take the experts that put them first, up to their fair load.

    Returns whether anybody moved.
    """
    crowded = any(packing.over(worker) for worker in range(len(packing.on)))
    newcomers = [worker for worker, experts in enumerate(packing.on) if not experts]
    took = False
    for newcomer in newcomers:
        for expert in range(len(packing.homes)):
            home = _worst_home(packing, expert)
            if home is not None and _prefers(packing, expert, home, newcomer, crowded):
                packing.move(expert, home, newcomer)
                took = True
    return took


def _worst_home(packing: Packing, expert: int) -> int | None:
    row = packing.task.scores[expert]
    return min(packing.homes[expert], key=lambda worker: (row[worker], worker), default=None)


def _prefers(packing: Packing, expert: int, home: int, newcomer: int, crowded: bool) -> bool:
    """Whether an expert is to move to a newcomer, which must end up no busier than its home."""
    task = packing.task
    row, demand = task.scores[expert], task.experts[expert]
    if row[newcomer] <= row[home] or newcomer in packing.homes[expert]:
        return False
    lane = packing.lanes.get(demand.rank)
    if lane is not None and newcomer not in lane:
        return False
    if crowded and not packing.over(home):
        return False  # it has a slot of its own there
    if not packing.admits(expert, newcomer) or not (packing.free(newcomer) or crowded):
        return False
    after = packing.burden(newcomer, packing.share(expert), demand.rank)
    cap = task.fair * (1 + task.policy.slack)
    return after <= cap + EPSILON and after < packing.burden(home) - EPSILON


def balance(packing: Packing) -> None:
    """Move experts off the busiest workers, if the busiest load then falls by `policy.gain`.

    It stops half that gain above the fair load, or where no move makes the busiest lighter, so
    that what was moved once does not move again for a little noise.
    """
    policy = packing.task.policy
    before = packing.busiest()
    if packing.task.fair > (1 - policy.gain) * before:
        return
    goal = packing.task.fair * (1 + max(policy.slack, policy.gain / 2))
    moves: list[_Move] = []
    for _ in range(2 * len(packing.homes)):
        burdens = [packing.burden(worker) for worker in range(len(packing.on))]
        busiest = max(range(len(burdens)), key=lambda worker: (burdens[worker], -worker))
        if burdens[busiest] <= goal + EPSILON:
            break
        found = _relief(packing, busiest, burdens[busiest], goal)
        if not found:
            break
        for move in found:
            packing.move(move.expert, move.source, move.target)
        moves += found
    if packing.busiest() > (1 - policy.gain) * before:
        for move in reversed(moves):
            packing.move(move.expert, move.target, move.source)


@dataclass(frozen=True, slots=True)
class _Move:
    expert: int
    source: int
    target: int


def _relief(packing: Packing, busiest: int, burden: float, goal: float) -> list[_Move]:
    """The moves that make the busiest worker lighter, or none.

    An expert that takes the excess with it goes first: the fewest moves.
    """
    best: list[_Move] = []
    least = burden - EPSILON
    for expert in _candidates(packing, busiest, burden):
        for moves, after in _ways(packing, expert, busiest):
            if after <= goal:
                return moves
            if after < least:
                best, least = moves, after
    return best


def _candidates(packing: Packing, busiest: int, burden: float) -> Iterator[int]:
    """Experts of a worker: the heaviest within its excess, then the lightest beyond it."""
    experts = sorted(packing.on[busiest], key=lambda e: (packing.share(e), -e))
    excess = (1 - packing.task.fair / burden) * sum(map(packing.share, experts))
    within = sum(packing.share(e) <= excess + EPSILON for e in experts)
    yield from islice(reversed(experts[:within]), TRIES)
    yield from islice(experts[within:], TRIES)


def _ways(packing: Packing, expert: int, source: int) -> Iterator[tuple[list[_Move], float]]:
    """Moves of an expert, by its rendezvous order, each with the burden of who is busier then."""
    task = packing.task
    demand, share = task.experts[expert], packing.share(expert)
    for target in task.orders[expert]:
        if target in packing.homes[expert] or packing.refuses(expert, target):
            continue
        if packing.free(target) or packing.over(source):
            if packing.admits(expert, target):
                after = packing.burden(target, share, demand.rank)
                yield [_Move(expert, source, target)], max(after, packing.burden(source, -share))
        else:
            yield from _exchange(packing, expert, source, target)


def _exchange(
    packing: Packing, expert: int, source: int, target: int
) -> Iterator[tuple[list[_Move], float]]:
    """An expert for the lightest of the target, where nobody has a slot to give away."""
    experts = packing.task.experts
    others = (e for e in packing.on[target] if not packing.refuses(e, source))
    other = max((e for e in others if e not in packing.on[source]), default=None)
    if other is None:
        return
    share = packing.share(expert) - packing.share(other)
    size = experts[expert].bytes - experts[other].bytes
    if share <= 0 or packing.overflow(target, size) or packing.overflow(source, -size):
        return
    after = packing.burden(target, share, experts[expert].rank)
    before = packing.burden(source, -share, experts[other].rank)
    yield [_Move(expert, source, target), _Move(other, target, source)], max(after, before)
