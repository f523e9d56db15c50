import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.training_pool import SAMPLE_S, WINDOW_S, Meter, Pool, Training


def training(expert: str, step: int, steps: int, tokens_per_second: float) -> Training:
    return Training(expert, "a", 1, steps, 0.0, step, step * 100, tokens_per_second)


def test_a_meter_forgets_what_is_older_than_its_window() -> None:
    meter = Meter(0.0)
    meter.add(1.0, 1_000_000, 1000.0)
    for second in range(2, 200):
        meter.add(float(second), 50, 0.5)
    tokens, steps = meter.rates(199.0)
    assert tokens == pytest.approx(50, rel=2 * SAMPLE_S / WINDOW_S)
    assert steps == pytest.approx(0.5, rel=2 * SAMPLE_S / WINDOW_S)


@given(st.lists(st.tuples(st.floats(0.01, 30.0), st.integers(0, 1000)), min_size=1))
def test_a_meter_never_shows_more_than_was_counted(adds: list[tuple[float, int]]) -> None:
    meter, now = Meter(0.0), 0.0
    for pause, tokens in adds:
        now += pause
        meter.add(now, tokens, 1.0)
    shown, steps = meter.rates(now)
    assert 0 <= shown <= sum(tokens for _, tokens in adds) / SAMPLE_S
    assert 0 < steps <= len(adds) / SAMPLE_S


def test_an_expert_tells_its_time_left_after_its_first_report() -> None:
    assert training("x", 0, 100, 0.0).seconds_left is None
    assert training("x", 20, 100, 50.0).seconds_left == pytest.approx(160)


def test_an_expert_to_be_tried_again_is_all_before_the_pool() -> None:
    pool = Pool(3, 1, 300, Meter(0.0), started={"x": 120, "y": 100}, again={"x"})
    running = [training("y", 60, 100, 50.0)]
    assert pool.steps_left(running) == 120 + 40 + 80
    assert pool.share_done(running) == pytest.approx(60 / 300)


def test_a_pool_that_has_not_moved_knows_no_time_left() -> None:
    assert Pool(3, 1, 300, Meter(0.0)).seconds_left([], 100.0) is None
