"""Names to targets, targets to homes."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import GatewayConfig
from server.gateway.choice import Chooser, conversation_key
from server.gateway.counts import LocalCounts
from server.gateway.errors import ModelNotFoundError, NoEngineError
from server.gateway.views import Target, View
from server.table import Canary, ExpertHome, RoutingTable
from tests.server.gateway.conftest import BASE, LAW, SPORT, make_table, make_worker

NEW_SPORT = "expert-0000@eeeeeeeeeeee"


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_chooser(clock: Clock | None = None, **gateway: Any) -> Chooser:
    config = GatewayConfig(retry_after_s=5, **gateway)
    return Chooser(config, LocalCounts(), clock=clock or time.monotonic)


def table_with(*experts_of_workers: list[str], **changes: Any) -> RoutingTable:
    workers = (
        make_worker(number, f"http://host:{number}", experts)
        for number, experts in enumerate(experts_of_workers)
    )
    return make_table(1, *workers, **changes)


def chooser_with(
    *experts_of_workers: list[str], clock: Clock | None = None, **gateway: Any
) -> Chooser:
    chooser = make_chooser(clock, **gateway)
    chooser.update(table_with(*experts_of_workers))
    return chooser


def target_of(chooser: Chooser, name: str) -> Target:
    return chooser.named(name)[1]


def worker_of(chooser: Chooser, target: Target, key: int = 0, tried: set[str] | None = None) -> str:
    home = chooser.choose(target, key, tried or set())
    assert home is not None
    return home.worker


def test_before_the_first_table() -> None:
    chooser = make_chooser()
    with pytest.raises(NoEngineError) as caught:
        chooser.named("expert-0000")
    assert caught.value.retry_after_s == 5
    with pytest.raises(NoEngineError):
        chooser.routed(None)
    with pytest.raises(NoEngineError):
        chooser.view(0)


def test_names() -> None:
    chooser = chooser_with([SPORT], [LAW])
    sport, base = target_of(chooser, SPORT), target_of(chooser, BASE)
    assert target_of(chooser, "expert-0000") is sport is chooser.routed("expert-0000")
    assert base is chooser.routed(None) is chooser.routed("expert-0009")
    assert [home.worker for home in base.homes] == ["worker-0", "worker-1"]
    assert [home.worker for home in target_of(chooser, LAW).homes] == ["worker-1"]


@pytest.mark.parametrize("name", ["", "expert-0002", "expert-0000@", "@aaaaaaaaaaaa", "introvert"])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        chooser_with([SPORT]).named(name)


def test_only_ready_workers_are_homes() -> None:
    chooser = make_chooser()
    chooser.update(
        make_table(
            1,
            make_worker(0, "http://host:0", [SPORT], state="down"),
            make_worker(1, None, [SPORT]),
            make_worker(2, "http://host:2/", [SPORT]),
        )
    )
    assert [home.url for home in target_of(chooser, SPORT).homes] == ["http://host:2"]


@given(loads=st.lists(st.integers(0, 9), min_size=2, max_size=8), key=st.integers(0, 2**32 - 1))
def test_never_the_most_loaded_when_another_is_less(loads: list[int], key: int) -> None:
    counts = LocalCounts()
    chooser = Chooser(GatewayConfig(affinity_slack=0), counts)
    chooser.update(table_with(*([SPORT] for _ in loads)))
    for number, load in enumerate(loads):
        counts.add(f"worker-{number}", load)
    load = counts.of(worker_of(chooser, target_of(chooser, SPORT), key))
    assert sorted(loads).index(load) <= len(loads) - 2
    if len(loads) == 2:
        assert load == min(loads)


@given(keys=st.sets(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_a_conversation_stays_with_its_replica(keys: set[int]) -> None:
    chooser = chooser_with([SPORT], [SPORT], [SPORT])
    target = target_of(chooser, SPORT)
    usual = {key: worker_of(chooser, target, key) for key in keys}
    assert usual == {key: worker_of(chooser, target, key) for key in keys}
    # The loss of a worker moves the conversations that it had, and no others.
    chooser.update(table_with([SPORT], [SPORT]))
    for key, worker in usual.items():
        assert worker == "worker-2" or worker_of(chooser, target, key) == worker


def test_replicas_share_the_conversations() -> None:
    chooser = chooser_with([SPORT], [SPORT], [SPORT])
    target = target_of(chooser, SPORT)
    usual = [
        worker_of(chooser, target, conversation_key(json.dumps([n]).encode())) for n in range(3000)
    ]
    assert all(800 < usual.count(f"worker-{n}") < 1200 for n in range(3))


def test_a_busy_replica_loses_its_conversations_beyond_the_slack() -> None:
    counts = LocalCounts()
    chooser = Chooser(GatewayConfig(affinity_slack=4), counts)
    chooser.update(table_with([SPORT], [SPORT]))
    target = target_of(chooser, SPORT)
    usual = worker_of(chooser, target, 7)
    counts.add(usual, 4)
    assert worker_of(chooser, target, 7) == usual
    counts.add(usual, 1)
    assert worker_of(chooser, target, 7) != usual


def test_the_turns_of_a_conversation_have_one_key() -> None:
    first = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi {x}"}]
    answer = {"role": "assistant", "content": "hello"}
    turns = [first, [*first, answer, {"role": "user", "content": "and now?"}]]
    for separators in ((",", ":"), (", ", ": ")):
        keys = {
            conversation_key(json.dumps(turn, separators=separators).encode()) for turn in turns
        }
        assert len(keys) == 1
    other = [first[0], {"role": "user", "content": "ho"}]
    assert conversation_key(json.dumps(other).encode()) not in keys
    long = b'[{"role":"user","content":"' + b"x" * 2000
    assert conversation_key(long) == conversation_key(long + b'y"}]')
    assert conversation_key(b"") == conversation_key(memoryview(b""))


def test_homes_that_were_tried_are_not_tried_again() -> None:
    chooser = chooser_with([SPORT], [SPORT], [SPORT])
    target, tried = target_of(chooser, SPORT), set[str]()
    for _ in range(3):
        tried.add(worker_of(chooser, target, tried=tried))
    assert tried == {"worker-0", "worker-1", "worker-2"}
    assert chooser.choose(target, 0, tried) is None


def test_a_failing_worker_is_left_alone_and_tried_again() -> None:
    clock = Clock()
    chooser = chooser_with([SPORT], [SPORT], clock=clock, breaker_failures=2, breaker_pause_s=1)
    target = target_of(chooser, SPORT)
    everywhere = {worker_of(chooser, target, key) for key in range(20)}
    chooser.breakers.failed("worker-0")
    assert {worker_of(chooser, target, key) for key in range(20)} == everywhere
    chooser.breakers.failed("worker-0")
    assert {worker_of(chooser, target, key) for key in range(20)} == {"worker-1"}
    chooser.breakers.failed("worker-1")
    clock.now += 0.5
    chooser.breakers.failed("worker-1")
    # All are left alone: the one whose trial comes first is tried, unless one waits already.
    assert {worker_of(chooser, target, key) for key in range(20)} == {"worker-0"}
    assert chooser.choose(target, 0, set(), patient=True) is None
    assert chooser.expected_wait(target) is None
    clock.now += 0.6
    assert {worker_of(chooser, target, key) for key in range(20)} == {"worker-0"}


def test_another_engine_is_forgiven() -> None:
    chooser = chooser_with([SPORT], [SPORT], breaker_failures=1)
    target = target_of(chooser, SPORT)
    chooser.breakers.failed("worker-0")
    chooser.update(table_with([SPORT], [SPORT]))
    assert chooser.breakers.troubled
    workers = [make_worker(0, "http://host:9", [SPORT]), make_worker(1, "http://host:1", [SPORT])]
    chooser.update(make_table(2, *workers))
    assert not chooser.breakers.troubled
    assert {worker_of(chooser, target, key) for key in range(20)} == {"worker-0", "worker-1"}


def test_requests_are_shown_for_workers_of_the_table_and_those_that_still_run() -> None:
    counts = LocalCounts()
    chooser = Chooser(GatewayConfig(), counts)
    chooser.update(table_with([SPORT]))
    assert chooser.in_flight == {"worker-0": 0}
    counts.add("worker-0", 1)
    chooser.update(make_table(2))
    assert chooser.in_flight == {"worker-0": 1}
    counts.add("worker-0", -1)
    assert chooser.in_flight == {}


def with_canary(share: float) -> RoutingTable:
    home = ExpertHome(
        id="expert-0000",
        version="eeeeeeeeeeee",
        served_name=NEW_SPORT,
        cluster=0,
        workers=["worker-0"],
    )
    canary = Canary(bundle="dddddddddddd", place="next", share=share, experts=[home])
    return table_with([SPORT, LAW, NEW_SPORT], canary=canary)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 0.25), (1.0, 1)])
def test_a_canary_gets_its_share_of_the_conversations(share: float, expected: float) -> None:
    chooser = make_chooser()
    chooser.update(with_canary(share))
    keys = [conversation_key(json.dumps([n]).encode()) for n in range(2000)]
    views = [chooser.view(key).bundle for key in keys]
    assert views.count("dddddddddddd") / len(views) == pytest.approx(expected, abs=0.04)
    assert views == [chooser.view(key).bundle for key in keys]


def test_versions_are_found_in_whichever_bundle_has_them() -> None:
    chooser = make_chooser()
    chooser.update(with_canary(0.5))
    served, canary = chooser.view(2**32 - 1), chooser.view(0)
    assert (served.bundle, canary.bundle) == ("cccccccccccc", "dddddddddddd")

    def found(name: str, view: View) -> tuple[str, str]:
        of, target = chooser.named(name, view)
        return of.bundle, target.served_name

    assert found("expert-0000", served) == ("cccccccccccc", SPORT)
    assert found("expert-0000", canary) == ("dddddddddddd", NEW_SPORT)
    for view in (served, canary):
        assert found(SPORT, view) == ("cccccccccccc", SPORT)
        assert found(NEW_SPORT, view) == ("dddddddddddd", NEW_SPORT)
    assert found("expert-0001", canary) == ("cccccccccccc", LAW)
    assert canary.routed("expert-0001") is canary.base


def test_a_request_finds_the_homes_of_its_version_in_a_later_table() -> None:
    chooser = chooser_with([SPORT])
    target = target_of(chooser, SPORT)
    moved = make_table(2, make_worker(3, "http://host:3", [SPORT, NEW_SPORT]), experts=[])
    chooser.update(moved)
    assert worker_of(chooser, target) == "worker-3"
    chooser.update(make_table(3))
    assert chooser.choose(target, 0, set()) is None


@pytest.mark.parametrize(
    ("states", "hopeless"),
    [(["failed"], True), (["failed", "down"], False), (["starting"], False)],
)
def test_waiting_is_in_vain_where_every_home_has_failed(states: Any, hopeless: bool) -> None:
    chooser = make_chooser()
    workers = [make_worker(n, None, [SPORT], state=state) for n, state in enumerate(states)]
    chooser.update(make_table(1, *workers))
    assert chooser.hopeless(target_of(chooser, SPORT)) is hopeless
    assert chooser.hopeless(target_of(chooser, BASE)) is hopeless


def test_whoever_waits_for_an_expert_that_its_worker_holds_no_more_chooses_anew() -> None:
    chooser = make_chooser(worker_concurrency=1)
    chooser.update(table_with([SPORT, LAW]))
    (home,) = target_of(chooser, SPORT).homes
    woken: list[object] = []
    assert home.lane.enter(SPORT) is not None
    assert home.lane.queue(SPORT, "", 1.0, woken.append) is not None
    chooser.update(table_with([SPORT, LAW, NEW_SPORT]))
    assert woken == []  # more is no reason to leave
    chooser.update(table_with([LAW, NEW_SPORT]))
    assert woken == [None]


async def test_only_the_return_of_a_worker_wakes_those_without_a_home() -> None:
    chooser = chooser_with([SPORT], [LAW], breaker_failures=1)
    assert chooser.breakers.failed("worker-0")
    waiting = asyncio.create_task(chooser.change(60))
    try:
        await asyncio.sleep(0)
        chooser.recovered("worker-1")
        await asyncio.sleep(0)
        assert not waiting.done()
        chooser.recovered("worker-0")
        async with asyncio.timeout(10):
            await waiting
    finally:
        waiting.cancel()


def test_slots_group_only_where_there_are_more_experts() -> None:
    chooser = make_chooser(processes=2)
    chooser.update(make_table(1, make_worker(0, "http://host", [SPORT, LAW], slots=2)))
    (home,) = target_of(chooser, SPORT).homes
    assert (home.lane.slots, home.residency) == (None, None)
    chooser.update(make_table(1, make_worker(0, "http://host", [SPORT, LAW], slots=1)))
    (crowded,) = target_of(chooser, SPORT).homes
    assert crowded.lane is home.lane
    assert crowded.lane.slots == 1
    assert crowded.residency is not None
    assert crowded.residency.slots == 2, "one more, for the next of those that wait"


def test_the_slots_of_another_engine_are_empty() -> None:
    chooser = make_chooser()
    worker = make_worker(0, "http://host", [SPORT, LAW], slots=1)
    chooser.update(make_table(1, worker))
    (before,) = target_of(chooser, SPORT).homes
    assert before.residency is not None
    before.residency.touch(SPORT)
    chooser.update(make_table(2, worker))
    (same,) = target_of(chooser, SPORT).homes
    assert same.residency is before.residency
    chooser.update(make_table(3, worker.model_copy(update={"url": "http://host:2", "pid": 2})))
    (after,) = target_of(chooser, SPORT).homes
    assert after.residency is not None
    assert SPORT not in after.residency
    assert chooser.resident == {"worker-0": 0}, "it is the one that is shown"


def test_each_process_has_its_share_of_the_slots_and_one_to_spare() -> None:
    chooser = make_chooser(processes=2)
    experts = [f"expert-{n:04d}@aaaaaaaaaaaa" for n in range(1, 9)]
    chooser.update(make_table(1, make_worker(0, "http://host", [*experts, SPORT], slots=6)))
    (home,) = target_of(chooser, SPORT).homes
    assert home.residency is not None
    assert (home.lane.slots, home.residency.slots) == (3, 4)


def test_a_large_table_is_taken_quickly() -> None:
    names = [f"expert-{n:04d}@aaaaaaaaaaaa" for n in range(5000)]
    workers = [make_worker(n, f"http://host:{n}", names[n::64]) for n in range(64)]
    experts = [
        ExpertHome(id=name[:11], version="aaaaaaaaaaaa", served_name=name, cluster=n, workers=[])
        for n, name in enumerate(names)
    ]
    chooser = make_chooser()
    chooser.update(make_table(1, *workers, experts=experts))
    assert target_of(chooser, "expert-4999").homes[0].worker == f"worker-{4999 % 64}"
