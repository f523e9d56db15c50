"""Breakers: when a worker is left alone, and what brings it back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.gateway.breaker import MAX_PAUSE_S, Breaker, Breakers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(pause_s: float = 1.0) -> Breaker:
    breaker = Breaker(3, pause_s)
    assert [breaker.failed(0.0) for _ in range(3)] == [False, False, True]
    return breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(3, 1.0)
    for _ in range(5):
        assert not breaker.failed(0.0)
        assert not breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.state(0.0) == "closed"
    assert opened().state(0.0) == "open"


def test_it_opens_at_once_where_the_failure_is_certain() -> None:
    breaker = Breaker(3, 1.0)
    assert breaker.failed(0.0, for_certain=True)
    assert breaker.state(0.0) == "open"
    assert not breaker.failed(0.5, for_certain=True), "it is left alone already"
    assert breaker.state(1.0) == "half-open"


def test_one_trial_at_a_time() -> None:
    breaker = opened()
    assert not breaker.allows(0.9)
    assert breaker.state(1.0) == "half-open"
    assert breaker.allows(1.0)
    assert breaker.began(1.0)
    assert not breaker.allows(1.0)
    assert not breaker.began(1.0)
    breaker.abandoned()
    assert breaker.allows(1.0)


def test_pauses_double_up_to_a_limit() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(8):
        pauses.append(breaker.open_until - now)
        now = breaker.open_until
        breaker.began(now)
        assert breaker.failed(now)
    assert pauses == [1, 2, 4, 8, 16, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]
    breaker.succeeded()
    assert [breaker.failed(now) for _ in range(3)] == [False, False, True]
    assert breaker.open_until == now + 1


def test_failures_of_requests_from_before_do_not_lengthen_the_pause() -> None:
    breaker = opened()
    assert not breaker.failed(0.5)
    assert breaker.open_until == 1.0


def test_an_answer_lets_requests_in_and_one_more_failure_keeps_them_out() -> None:
    breaker = opened()
    breaker.began(1.0)
    breaker.answered()
    assert breaker.allows(1.0)
    assert breaker.failed(1.5)
    assert not breaker.allows(1.6)


@given(st.lists(st.sampled_from(["fail", "succeed", "try", "give up", "wait"]), max_size=60))
def test_it_never_stays_shut_for_ever(events: list[str]) -> None:
    clock = Clock()
    breakers = Breakers(2, 1.0, clock)
    for event in events:
        if event == "wait":
            clock.now += 1.0
        elif event == "try":
            breakers.began("w")
        elif event == "give up":
            breakers.abandoned("w")
        elif event == "succeed":
            breakers.succeeded("w")
            assert not breakers.troubled
        else:
            breakers.failed("w")
    breakers.abandoned("w")
    clock.now += MAX_PAUSE_S
    assert breakers.allows("w")


def test_the_least_bad() -> None:
    clock = Clock()
    breakers = Breakers(1, 1.0, clock)
    breakers.failed("a")
    clock.now = 0.5
    breakers.failed("b")
    assert breakers.state("a") == "open"
    assert breakers.least_bad(["b", "a"], str) == "a"
    assert breakers.least_bad(["b", "a", "new"], str) == "new"
    breakers.forget("b")
    assert breakers.state("b") == "closed"
