from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.manifest import ExpertCard
from deploy.training_state import TrainingState
from expert_trainer.types import (
    ActorLost,
    ActorUp,
    ExpertFailed,
    ExpertFinished,
    ExpertMeasured,
    ExpertProgress,
    ExpertReused,
    ExpertStarted,
    JobFinished,
    PoolEnded,
    PoolStarted,
    TrainEvent,
)

Cards = Callable[..., ExpertCard]


@pytest.fixture
def state(clock: Any) -> TrainingState:
    return TrainingState(clock)


def feed(state: TrainingState, *events: TrainEvent) -> None:
    for event in events:
        state(event)


def progress(expert: str, step: int, rate: float = 100.0, tokens: int | None = None) -> TrainEvent:
    return ExpertProgress(expert, "a", step, 100, 2.0, tokens or step * 100, rate)


def test_counts_of_a_run_from_its_first_event_to_its_last(
    state: TrainingState, make_card: Cards
) -> None:
    feed(state, ExpertReused("expert-0009", make_card("expert-0009")))
    assert state.counts.all == state.counts.reused == 1
    feed(
        state,
        PoolStarted(3, 1, 300),
        ActorUp("a", "n", "cpu", 1),
        ExpertStarted("x", "a", 100, 1),
        ExpertStarted("y", "a", 100, 1),
    )
    counts = state.counts
    assert (counts.all, counts.done, counts.running, counts.queued) == (4, 0, 2, 1)
    feed(state, ExpertFailed("x", "nan", 1, final=False))
    assert (state.counts.running, state.counts.queued, state.counts.failed) == (1, 2, 0)
    feed(state, ExpertStarted("x", "a", 100, 2), ExpertFailed("x", "nan", 2, final=True))
    feed(state, ExpertFinished("y", make_card("y")), ExpertStarted("z", "a", 100, 1))
    feed(state, JobFinished("z", None), PoolEnded(10.0, 9.0))
    counts = state.counts
    assert (counts.done, counts.running, counts.queued, counts.failed) == (2, 0, 0, 1)
    assert (state.retries, state.actor_seconds, state.computing_seconds) == (1, 10.0, 9.0)
    assert set(state.cards) == {"expert-0009", "y"}


def test_a_second_pool_counts_afresh_and_costs_add_up(state: TrainingState) -> None:
    feed(state, PoolStarted(1, 1, 5), ExpertStarted("shared", "a", 5, 1))
    feed(state, JobFinished("shared", None), PoolEnded(4.0, 3.0), PoolStarted(7, 2, 70))
    assert (state.counts.all, state.counts.done, state.starting) == (7, 0, 2)
    feed(state, PoolEnded(6.0, 5.0))
    assert (state.actor_seconds, state.computing_seconds, state.starting) == (10.0, 8.0, 0)


def test_actors_and_what_they_are_at(state: TrainingState) -> None:
    feed(
        state,
        PoolStarted(2, 2, 200),
        ActorUp("a", "node-1", "cuda:0", 1),
        ExpertStarted("x", "a", 100, 1),
        ExpertStarted("y", "a", 50, 1),
        progress("x", 20, rate=70.0),
        progress("y", 20, rate=30.0),
        ExpertMeasured("x", 20, 1.5),
    )
    actor = state.actors["a"]
    assert (actor.tokens_per_second, actor.steps_left, state.starting) == (100.0, 80, 1)
    assert actor.training["x"].heldout == 1.5
    feed(state, ActorLost("a", "SIGKILL"))
    assert state.actors == {}
    assert state.counts.running == 2, "until the pool says what becomes of them"


def test_late_events_of_unknown_experts_change_nothing(state: TrainingState) -> None:
    feed(state, progress("ghost", 3), ExpertMeasured("ghost", 3, 1.0))
    assert state.training == {}
    assert state.tokens_trained == 0


def test_speed_is_that_of_the_last_minute(state: TrainingState, clock: Any) -> None:
    feed(state, PoolStarted(1, 1, 1000), ExpertStarted("x", "a", 1000, 1))
    for second in range(1, 301):
        clock.now = float(second)
        tokens = second * 100 if second <= 200 else 20_000 + (second - 200) * 10
        feed(state, progress("x", second, tokens=tokens))
    assert state.tokens_per_second == pytest.approx(10, rel=0.05)
    clock.now = 400.0
    assert state.tokens_per_second < 0.2, "nothing was heard for 100 s"


def test_tokens_from_before_a_resumption_are_no_speed(state: TrainingState, clock: Any) -> None:
    feed(state, PoolStarted(1, 1, 100), ExpertStarted("x", "a", 100, 1))
    clock.now = 2.0
    feed(state, progress("x", 90, rate=100.0, tokens=9_000))
    assert state.tokens_trained == pytest.approx(200)
    assert state.tokens_per_second == pytest.approx(100)


def test_what_a_failed_try_cost(state: TrainingState, clock: Any) -> None:
    feed(state, PoolStarted(1, 1, 100), ExpertStarted("x", "a", 100, 1))
    clock.now = 50.0
    feed(state, progress("x", 50), ExpertFailed("x", "killed", 1, final=False))
    feed(state, ExpertStarted("x", "a", 100, 2))
    clock.now = 52.0  # goes on from a checkpoint at 4,000 tokens
    feed(state, progress("x", 42, tokens=4_200))
    assert state.tokens_wasted == pytest.approx(1_000)
    feed(state, ExpertFailed("x", "killed", 2, final=True))
    assert state.tokens_wasted == pytest.approx(5_200), "now all of it was for nothing"


def test_time_left_knows_that_the_rest_is_shorter(state: TrainingState, clock: Any) -> None:
    """Two long experts of ten are half of all steps."""
    feed(state, PoolStarted(10, 2, 400), ActorUp("a", "n", "cpu", 1))
    assert state.seconds_left is None
    feed(state, ExpertStarted("x", "a", 100, 1), ExpertStarted("y", "b", 100, 1))
    clock.now = 50.0
    feed(state, progress("x", 50), progress("y", 50))
    assert state.seconds_left == pytest.approx(150), "300 steps at 2 a second"
    assert state.share_done == pytest.approx(0.25)
    assert state.steps_known


def test_time_left_is_a_bound_where_steps_are_not_told(state: TrainingState, clock: Any) -> None:
    feed(state, PoolStarted(3, 1), ExpertStarted("x", "a", 100, 1))
    clock.now = 50.0
    feed(state, progress("x", 50))
    assert not state.steps_known
    assert state.seconds_left == pytest.approx(250), "two more, at most as long as the first"


def test_the_last_expert_is_waited_for_at_its_own_speed(state: TrainingState, clock: Any) -> None:
    feed(state, PoolStarted(2, 2, 200))
    feed(state, ExpertStarted("x", "a", 100, 1), ExpertStarted("y", "b", 100, 1))
    clock.now = 20.0
    feed(state, progress("x", 90, rate=450.0), progress("y", 10, rate=50.0))
    assert state.seconds_left == pytest.approx(180), "90 steps of 100 tokens at 50 tokens/s"


def test_early_stopping_shortens_what_is_expected(
    state: TrainingState, clock: Any, make_card: Cards
) -> None:
    feed(state, PoolStarted(2, 1, 200), ExpertStarted("x", "a", 100, 1))
    clock.now = 50.0
    card = make_card("x", steps=50, stopped_early=True, tokens_seen=5_000)
    feed(state, progress("x", 40), ExpertFinished("x", card))
    assert state.seconds_left == pytest.approx(50), "the other one is taken to stop early too"


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["start", "step", "retry", "fail", "done"]))
    )
)
def test_parts_add_up_and_shares_stay_in_bounds(moves: list[tuple[int, str]]) -> None:
    now = 0.0
    state = TrainingState(lambda: now)
    state(PoolStarted(6, 2, 600))
    ended: set[str] = set()
    for number, move in moves:
        now += 1.0
        name = f"x{number}"
        if name in ended or (move == "start") == (name in state.training):
            continue
        match move:
            case "start":
                state(ExpertStarted(name, "a", 100, 1))
            case "step":
                state(progress(name, min(state.training[name].step + 10, 100)))
            case "retry":
                state(ExpertFailed(name, "c", 1, final=False))
            case _:
                ended.add(name)
                final = ExpertFailed(name, "c", 1, final=True)
                state(final if move == "fail" else JobFinished(name, None))
        counts = state.counts
        parts = counts.done + counts.running + counts.queued + counts.failed + counts.reused
        assert parts == counts.all == 6
        assert 0 <= state.share_done <= 1
        assert 0 <= state.tokens_wasted <= state.tokens_trained
        assert state.seconds_left is None or state.seconds_left >= 0
