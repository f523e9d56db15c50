from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.calibration import NEVER, Calibration, abstention_threshold, calibrate
from router.errors import CalibrationError

cosines = st.floats(-1, 1, width=32)
distinct = st.lists(cosines, min_size=1, max_size=200, unique=True)
shares = st.floats(0, 1)


@given(distinct, st.floats(0, 1, exclude_min=True))
def test_the_share_asked_for_falls_below(scores: list[float], quantile: float) -> None:
    threshold = abstention_threshold(scores, quantile)
    below = sum(score < threshold for score in scores)
    assert below == math.floor(quantile * len(scores) + 1e-9)


@given(st.lists(cosines, min_size=1), shares)
def test_ties_never_turn_away_more_than_the_share(scores: list[float], quantile: float) -> None:
    threshold = abstention_threshold(scores + scores, quantile)
    assert sum(score < threshold for score in scores) <= quantile * len(scores) + 1e-6


@given(distinct, shares, shares)
def test_a_larger_share_never_lowers_the_threshold(
    scores: list[float], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assert abstention_threshold(scores, low) <= abstention_threshold(scores, high)


@given(st.lists(cosines))
def test_a_quantile_of_zero_never_abstains(scores: list[float]) -> None:
    assert abstention_threshold(scores, 0.0) == NEVER == -1.0


def test_a_quantile_of_one_abstains_on_all_of_it() -> None:
    assert abstention_threshold([0.2, 0.5], 1.0) > 0.5


def test_a_share_that_is_a_whole_number_of_texts_counts_them_all() -> None:
    assert abstention_threshold(np.arange(100) / 100, 0.29) == 0.29


def test_no_scores_say_what_to_do() -> None:
    with pytest.raises(CalibrationError, match=r"data\.valid.*abstain_quantile to 0"):
        abstention_threshold([], 0.01)


@pytest.mark.parametrize("quantile", [-0.1, 1.1])
def test_a_quantile_is_a_share(quantile: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        abstention_threshold([0.5], quantile)


def test_the_record_tells_what_the_threshold_was_drawn_from() -> None:
    record = calibrate([0.1, 0.2, 0.3, 0.4], 0.25)
    assert (record.threshold, record.quantile, record.heldout_texts) == (0.2, 0.25, 4)
    assert record.score_quantiles["0.0"] == 0.1
    assert record.score_quantiles["0.5"] == pytest.approx(0.25)
    assert record.score_quantiles["1.0"] == 0.4


def test_the_record_survives_json() -> None:
    record = calibrate(np.float32([0.1, 1 / 3, 0.7]), 0.5)
    assert Calibration.model_validate_json(record.model_dump_json()) == record


def test_without_heldout_text_there_is_nothing_to_record() -> None:
    record = calibrate([], 0.0)
    assert (record.threshold, record.heldout_texts, record.score_quantiles) == (NEVER, 0, {})
