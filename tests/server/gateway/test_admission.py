"""Lanes: limits, order, fairness between tenants, and slots; all in simulated time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.admission import Group, Lane, Waiter

INF = 10**9


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Job:
    """A request of a simulation."""

    number: int
    expert: str | None
    tenant: str = ""
    weight: float = 1.0
    arrived: float = 0.0
    started: float | None = None
    starts: int = 0
    ticket: Group | None = None
    waiter: Waiter | None = None
    sent_away: bool = False


@dataclass
class Worker:
    """A lane, and whoever is in it."""

    lane: Lane
    clock: Clock
    started: list[Job] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    @classmethod
    def make(cls, limit: int, slots: int | None = None, queue: int = INF) -> Worker:
        clock = Clock()
        lane = Lane(limit=limit, max_queue=queue, group_wait_s=1.0, clock=clock)
        lane.regroup(slots)
        return cls(lane, clock)

    def come(self, expert: str | None, tenant: str = "", weight: float = 1.0) -> Job:
        job = Job(next(self.numbers), expert, tenant, weight, self.clock.now)
        ticket = self.lane.enter(expert)
        if ticket is not None:
            self._start(job, ticket)
            return job

        def woken(ticket: Group | None) -> None:
            if ticket is None:
                job.sent_away = True
            else:
                self._start(job, ticket)

        job.waiter = self.lane.queue(expert, tenant, weight, woken)
        return job

    def end(self, job: Job, seconds: float | None = None) -> None:
        assert job.ticket is not None
        ticket, job.ticket = job.ticket, None
        self.lane.leave(ticket, seconds)

    def _start(self, job: Job, ticket: Group) -> None:
        job.ticket = ticket
        job.starts += 1
        job.started = self.clock.now
        self.started.append(job)

    @property
    def running(self) -> list[Job]:
        return [job for job in self.started if job.ticket is not None]

    def check(self, slots: int | None) -> None:
        """What holds at every moment."""
        running = self.running
        assert self.lane.active == len(running) <= self.lane.limit
        experts = {job.expert for job in running} - {None}
        assert slots is None or len(experts) <= slots


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "end", "give up", "pass"]),
        st.sampled_from([None, "a", "b", "c", "d"]),
        st.integers(0, 50),
    ),
    max_size=120,
)


@given(events=EVENTS, limit=st.integers(1, 5), slots=st.sampled_from([None, 1, 2, 3]))
def test_limits_hold_and_everybody_is_served_once(
    events: list[tuple[str, str | None, int]], limit: int, slots: int | None
) -> None:
    worker = Worker.make(limit, slots)
    jobs: list[Job] = []
    left: set[int] = set()
    for what, expert, pick in events:
        waiting = [j for j in jobs if not j.starts and j.number not in left]
        if what == "come":
            jobs.append(worker.come(expert, tenant="xyz"[pick % 3], weight=1 + pick % 2))
        elif what == "end" and worker.running:
            worker.end(worker.running[pick % len(worker.running)], 1.0)
        elif what == "give up" and waiting:
            job = waiting[pick % len(waiting)]
            assert job.waiter is not None
            worker.lane.abandon(job.waiter)
            left.add(job.number)
        else:
            worker.clock.now += pick / 20
        worker.check(slots)
        assert worker.lane.waiting == sum(not j.starts for j in jobs) - len(left)
    while worker.running:
        worker.end(worker.running[0])
        worker.check(slots)
    assert worker.lane.waiting == worker.lane.active == 0
    for job in jobs:
        assert job.starts == (0 if job.number in left else 1)


@given(events=EVENTS, slots=st.integers(1, 3))
def test_who_comes_next_is_known_while_it_waits(
    events: list[tuple[str, str | None, int]], slots: int
) -> None:
    """Whoever gets a slot that an end has left free is the one that was told before."""
    worker = Worker.make(4, slots)
    lane = worker.lane
    for what, expert, pick in events:
        if what == "come":
            worker.come(expert, tenant="xyz"[pick % 3])
        elif what == "end" and worker.running:
            ended = worker.running[pick % len(worker.running)]
            before = {job.expert for job in worker.running}
            told = lane.upcoming()
            assert told is None or lane.waits_outside(told)
            seen = len(worker.started)
            worker.end(ended)
            entered = [job.expert for job in worker.started[seen:] if job.expert not in before]
            assert entered[:1] in ([], [told])
            assert told not in entered or not lane.waits_outside(str(told))
        else:
            worker.clock.now += pick / 20
    waiting = {g.key for g in lane._in_line.values() if g.key and not g.active}
    assert (lane.upcoming() is None) == (not waiting)


def test_nobody_comes_next_where_all_have_slots() -> None:
    worker = Worker.make(1)
    worker.come("a")
    worker.come("b")
    assert worker.lane.upcoming() is None
    assert not worker.lane.waits_outside("b")


@given(st.lists(st.sampled_from(["x", "y", "z"]), min_size=2, max_size=40), st.integers(1, 4))
def test_a_tenants_requests_are_served_in_their_order(tenants: list[str], limit: int) -> None:
    worker = Worker.make(limit)
    for tenant in tenants:
        worker.come("a", tenant, {"x": 1.0, "y": 3.0, "z": 0.5}[tenant])
    while worker.running:
        worker.end(worker.running[0])
    for tenant in "xyz":
        order = [job.number for job in worker.started if job.tenant == tenant]
        assert order == sorted(order)


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=4),
    limit=st.integers(1, 4),
)
def test_tenants_get_their_shares(weights: list[float], limit: int) -> None:
    """As long as all of them wait, no tenant is ahead of or behind its share by more than the one
    request that start-time fair queueing allows it, and one of another's."""
    worker = Worker.make(limit)
    for _ in range(limit):
        worker.come("a")
    for tenant, weight in enumerate(weights):
        for _ in range(200):
            worker.come("a", str(tenant), weight)
    for _ in range(100):
        worker.end(worker.running[0])
    served = Counter(job.tenant for job in worker.started[limit:])
    normal = [served[str(tenant)] / weight for tenant, weight in enumerate(weights)]
    assert max(normal) - min(normal) <= max(1 / w for w in weights) + 1e-9 + max(
        1 / w for w in weights
    )


def test_one_tenants_flood_delays_another_by_one_request() -> None:
    worker = Worker.make(2)
    for _ in range(500):
        worker.come("a", "flood")
    late = worker.come("a", "other")
    worker.end(worker.running[0])
    worker.end(worker.running[0])
    assert late.started is not None


def test_a_full_queue_takes_nobody() -> None:
    worker = Worker.make(1, queue=2)
    jobs = [worker.come("a") for _ in range(4)]
    assert jobs[3].waiter is None
    assert worker.lane.waiting == 2
    assert jobs[1].waiter is not None
    worker.lane.abandon(jobs[1].waiter)
    worker.lane.abandon(jobs[1].waiter)
    assert worker.lane.waiting == 1
    assert worker.come("a").waiter is not None


def test_the_base_needs_no_slot() -> None:
    worker = Worker.make(8, slots=1)
    worker.come("a")
    assert worker.come("b").started is None
    assert worker.come(None).started is not None
    assert worker.come("a").started is not None


def test_an_expert_that_waited_too_long_gets_a_slot() -> None:
    worker = Worker.make(8, slots=1)
    first, tail = worker.come("a"), worker.come("b")
    worker.clock.now = 0.9
    second = worker.come("a")
    assert second.started is not None
    worker.clock.now = 1.0
    third = worker.come("a")
    assert third.started is None  # closed, for the sake of the other
    worker.end(first)
    assert tail.started is None
    worker.end(second)
    assert tail.started == 1.0
    worker.clock.now = 2.5
    worker.come("b")
    worker.end(tail)
    assert third.started == 2.5


def simulate(experts: int, slots: int, limit: int, rate: float, seconds: float) -> list[Job]:
    """Zipf traffic on one worker: half a second of service, exponential arrivals."""
    worker, chance = Worker.make(limit, slots), random.Random(7)
    weights = [1 / (1 + rank) ** 1.2 for rank in range(experts)]
    jobs: list[Job] = []
    ends: list[tuple[float, int]] = []
    seen = 0
    arrival = 0.0
    while arrival < seconds or ends:
        if arrival < seconds and (not ends or arrival <= ends[0][0]):
            worker.clock.now = arrival
            (expert,) = chance.choices(range(experts), weights)
            jobs.append(worker.come(f"expert-{expert}"))
            arrival += chance.expovariate(rate)
        else:
            worker.clock.now, number = heapq.heappop(ends)
            worker.end(jobs[number], 0.5)
        for job in worker.started[seen:]:
            heapq.heappush(ends, (worker.clock.now + 0.5, job.number))
        seen = len(worker.started)
        experts_running = {jobs[number].expert for _, number in ends}
        assert len(experts_running) <= slots
    return jobs


def test_the_tail_waits_no_longer_than_its_bound() -> None:
    """Hot experts would hold every slot for ever; what is late takes turns on the slots: each turn
    lasts as long as a request, and no more than all other experts can be before it."""
    experts, slots = 12, 3
    jobs = simulate(experts, slots, limit=64, rate=60.0, seconds=60.0)
    waits: dict[str | None, float] = {}
    for job in jobs:
        assert job.started is not None
        waits[job.expert] = max(waits.get(job.expert, 0.0), job.started - job.arrived)
    assert len(waits) == experts
    turn = 2 * 0.5  # those in flight drain, then the late one's requests
    assert max(waits.values()) <= 1.0 + turn * (experts - 1)


def test_without_the_bound_the_tail_would_starve() -> None:
    """The reason for it: slots are held for as long as their experts are asked for."""
    worker = Worker.make(64, slots=1)
    worker.lane._group_wait_s = float("inf")
    hot = worker.come("hot")
    tail = worker.come("tail")
    for _ in range(100):
        worker.clock.now += 1.0
        newer = worker.come("hot")
        worker.end(hot)
        hot = newer
    assert tail.started is None


def test_whoever_waits_is_sent_away_in_order_when_the_worker_changes() -> None:
    worker = Worker.make(1)
    running, *waiting = [worker.come("a", tenant) for tenant in ("x", "x", "y")]
    worker.lane.dissolve()
    assert all(job.sent_away for job in waiting)
    assert worker.lane.waiting == 0
    worker.end(running)
    assert worker.come("a").started is not None


def test_grouping_begins_and_ends_while_requests_run() -> None:
    worker = Worker.make(4)
    before = worker.come("a")
    worker.lane.regroup(1)
    grouped = worker.come("b")
    assert worker.come("c").started is None
    worker.lane.regroup(None)
    after = worker.come("c")
    for job in (before, grouped, after):
        worker.end(job)
    assert worker.lane.active == worker.lane.waiting == 0


def test_a_background_request_takes_nobodys_place() -> None:
    worker = Worker.make(limit=3)
    lane = worker.lane
    behind = [lane.enter_behind(None, 2) for _ in range(3)]
    assert [ticket is not None for ticket in behind] == [True, True, False]
    live = worker.come(None)
    assert live.ticket is not None, "live requests have the whole lane"
    waiting = worker.come(None)
    assert waiting.ticket is None
    assert behind[0] is not None
    lane.leave(behind[0])
    assert waiting.ticket is not None, "whoever waits is next"
    for ticket in (live.ticket, waiting.ticket):
        lane.leave(ticket)
    assert lane.enter_behind(None, 2) is not None
    assert lane.active == 2


def test_a_background_request_does_not_pass_those_who_wait_for_a_slot() -> None:
    worker = Worker.make(limit=8, slots=1)
    first = worker.come("a")
    assert first.ticket is not None
    assert worker.lane.enter_behind("b", 8) is None, "as live ones, it needs a slot"
    assert worker.lane.waiting == 0
    worker.come("b")
    assert worker.lane.enter_behind("a", 8) is None, "though a live one might"
    assert worker.lane.enter("a") is not None


def test_the_expected_wait() -> None:
    worker = Worker.make(2, slots=1)
    assert worker.lane.expected_wait("a") == 0.0
    job = worker.come("a")
    worker.end(job, 4.0)
    worker.come("a")
    assert worker.lane.expected_wait("a") == 0.0
    assert worker.lane.expected_wait("b") == pytest.approx(1.0 + 4.0)
    worker.come("a")
    assert worker.lane.expected_wait("a") == pytest.approx(2.0)
    worker.come("a")
    assert worker.lane.expected_wait("a") == pytest.approx(4.0)
