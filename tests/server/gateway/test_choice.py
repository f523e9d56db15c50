"""Names to targets, targets to homes."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.choice import Chooser
from server.gateway.errors import ModelNotFoundError, NoEngineError
from server.table import ExpertHome
from tests.server.gateway.conftest import BASE, LAW, SPORT, make_table, make_worker


def chooser_with(*experts_of_workers: list[str]) -> Chooser:
    chooser = Chooser(seed=0, retry_after_s=5)
    workers = (
        make_worker(number, f"http://host:{number}", experts)
        for number, experts in enumerate(experts_of_workers)
    )
    chooser.update(make_table(1, *workers))
    return chooser


def test_before_the_first_table() -> None:
    chooser = Chooser(seed=0, retry_after_s=5)
    with pytest.raises(NoEngineError) as caught:
        chooser.named("expert-0000")
    assert caught.value.retry_after_s == 5
    with pytest.raises(NoEngineError):
        chooser.routed(None)


def test_names() -> None:
    chooser = chooser_with([SPORT], [LAW])
    assert chooser.named("expert-0000") is chooser.named(SPORT) is chooser.routed("expert-0000")
    assert chooser.named(BASE) is chooser.routed(None) is chooser.routed("expert-0009")
    assert [home.worker for home in chooser.named(BASE).homes] == ["worker-0", "worker-1"]
    assert [home.worker for home in chooser.named(LAW).homes] == ["worker-1"]


@pytest.mark.parametrize("name", ["", "expert-0002", "expert-0000@", "@aaaaaaaaaaaa", "introvert"])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        chooser_with([SPORT]).named(name)


def test_only_ready_workers_are_homes() -> None:
    chooser = Chooser(seed=0, retry_after_s=5)
    chooser.update(
        make_table(
            1,
            make_worker(0, "http://host:0", [SPORT], state="down"),
            make_worker(1, None, [SPORT]),
            make_worker(2, "http://host:2/", [SPORT]),
        )
    )
    assert [home.url for home in chooser.named(SPORT).homes] == ["http://host:2"]


@given(loads=st.lists(st.integers(0, 9), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_never_the_most_loaded_when_another_is_less(loads: list[int], seed: int) -> None:
    chooser = Chooser(seed=seed, retry_after_s=5)
    workers = (make_worker(n, f"http://host:{n}", [SPORT]) for n in range(len(loads)))
    chooser.update(make_table(1, *workers))
    chooser.in_flight.update({f"worker-{n}": load for n, load in enumerate(loads)})
    chosen = chooser.choose(chooser.named(SPORT), set())
    load = chooser.in_flight[chosen.worker]
    assert sorted(loads).index(load) <= len(loads) - 2
    if len(loads) == 2:
        assert load == min(loads)


def test_homes_that_were_tried_are_not_tried_again() -> None:
    chooser = chooser_with([SPORT], [SPORT], [SPORT])
    target, tried = chooser.named(SPORT), set[str]()
    for _ in range(3):
        tried.add(chooser.choose(target, tried).worker)
    assert tried == {"worker-0", "worker-1", "worker-2"}
    with pytest.raises(NoEngineError):
        chooser.choose(target, tried)


def test_an_avoided_worker_is_the_last_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = chooser_with([SPORT], [SPORT])
    target = chooser.named(SPORT)
    assert chooser.avoid("worker-0")
    assert not chooser.avoid("worker-0")
    assert {chooser.choose(target, set()).worker for _ in range(20)} == {"worker-1"}
    chooser.avoid("worker-1")
    assert {chooser.choose(target, set()).worker for _ in range(20)} == {"worker-0", "worker-1"}
    later = time.monotonic() + 10
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert {chooser.choose(target, set()).worker for _ in range(20)} == {"worker-0", "worker-1"}


def test_a_new_table_forgives() -> None:
    chooser = chooser_with([SPORT], [SPORT])
    chooser.avoid("worker-0")
    assert chooser.table is not None
    chooser.update(chooser.table)
    target = chooser.named(SPORT)
    assert {chooser.choose(target, set()).worker for _ in range(20)} == {"worker-0", "worker-1"}


def test_counts_outlive_tables_and_end_with_the_request() -> None:
    chooser = chooser_with([SPORT])
    home = chooser.choose(chooser.named(SPORT), set())
    with chooser.busy(home):
        chooser.update(make_table(2))
        assert chooser.in_flight == {"worker-0": 1}
    assert chooser.in_flight == {"worker-0": 0}
    chooser.update(make_table(3))
    assert chooser.in_flight == {}


def test_a_large_table_is_taken_quickly() -> None:
    names = [f"expert-{n:04d}@aaaaaaaaaaaa" for n in range(5000)]
    workers = [make_worker(n, f"http://host:{n}", names[n::64]) for n in range(64)]
    experts = [
        ExpertHome(id=name[:11], version="aaaaaaaaaaaa", served_name=name, cluster=n, workers=[])
        for n, name in enumerate(names)
    ]
    table = make_table(1, *workers, experts=experts)
    chooser = Chooser(seed=0, retry_after_s=5)
    began = time.perf_counter()
    chooser.update(table)
    assert time.perf_counter() - began < 0.25
    assert chooser.named("expert-4999").homes[0].worker == f"worker-{4999 % 64}"
