from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.calibration import (
    NEVER,
    Before,
    Calibration,
    Sureness,
    abstention_threshold,
    asked_from,
    calibrate,
    doubted_below,
    sure_from,
)
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


def sure(
    confidences: npt.ArrayLike, agrees: npt.ArrayLike, scores: npt.ArrayLike | None = None
) -> Sureness:
    scores = np.ones(len(np.asarray(agrees))) if scores is None else scores
    return sure_from(confidences, scores, agrees, target=0.99, floor=0.5)


def test_a_student_answers_as_far_as_the_target_holds() -> None:
    right = np.ones(1000, dtype=bool)
    right[600::2] = False
    found = sure(np.linspace(1, 0, 1000), right)
    assert found.confidence is not None
    assert found.agreement is not None
    assert 0.59 < found.answered < 0.62
    assert found.agreement >= 0.99
    assert found.allows(found.confidence, 0.5)
    assert not found.allows(found.confidence, 0.49)
    assert not found.allows(float(np.nextafter(found.confidence, 0)), 0.5)


@pytest.mark.parametrize(("texts", "believed"), [(0, False), (186, False), (187, True)])
def test_few_texts_prove_nothing(texts: int, believed: bool) -> None:
    found = sure(np.linspace(1, 0.5, texts), np.ones(texts, dtype=bool))
    assert (found.confidence is not None) == believed
    assert found.answered == float(believed)
    assert found.allows(1.0, 1.0) == believed


def test_nothing_short_of_certainty_is_enough_for_a_target_of_one() -> None:
    found = sure_from(np.ones(5000), np.ones(5000), np.ones(5000), target=1.0, floor=0.0)
    assert found.confidence is None
    assert found.agreement is None


def test_what_another_has_answered_counts_towards_the_target() -> None:
    texts = np.linspace(1, 0.5, 150)
    alone = sure_from(texts, np.ones(150), np.ones(150), target=0.99, floor=0.0)
    assert alone.confidence is None, "150 texts alone prove nothing"
    after = sure_from(
        texts, np.ones(150), np.ones(150), target=0.99, floor=0.0, before=Before(1000, 2, 2)
    )
    assert after.answered == 1.0
    worse = sure_from(
        texts, np.ones(150), np.ones(150), target=0.99, floor=0.0, before=Before(1000, 12, 12)
    )
    assert worse.confidence is None


def test_what_was_estimated_from_more_texts_is_more_certain() -> None:
    texts = np.linspace(1, 0.5, 150)

    def answered(variance: float) -> float:
        before = Before(1000, 8, variance)
        return sure_from(
            texts, np.ones(150), np.ones(150), target=0.99, floor=0, before=before
        ).answered

    assert answered(8) == 0
    assert answered(2) == 1


def test_equal_confidences_are_believed_together_or_not_at_all() -> None:
    right = np.array([True] * 400 + [False] * 100)
    assert sure(np.ones(500), right).confidence is None


def test_a_floor_under_the_score_keeps_out_what_has_no_expert() -> None:
    """Confidence says nothing here; it is the texts far from every cluster that go wrong."""
    scores = np.linspace(0.5, 1, 1000)
    found = sure(np.full(1000, 0.9), scores > 0.54, scores)
    assert found.confidence == 0.9
    assert 0.53 < found.score < 0.56
    assert found.answered == pytest.approx(0.9, abs=0.02)


@given(st.integers(0, 2**32 - 1), st.integers(0, 600))
def test_what_is_recorded_is_what_the_limits_do(seed: int, texts: int) -> None:
    random = np.random.default_rng(seed)
    confidences = random.integers(0, 50, texts) / 50
    scores = random.random(texts)
    right = random.random(texts) < 0.9 + 0.1 * confidences
    found = sure(confidences, right, scores)
    allowed = np.array(
        [found.allows(*pair) for pair in zip(confidences, scores, strict=True)], dtype=bool
    )
    assert allowed.sum() == round(found.answered * texts)
    if allowed.any():
        assert found.agreement == pytest.approx(right[allowed].mean())
        assert found.agreement >= 0.99
    else:
        assert found.agreement is None


@given(
    texts=st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9]), st.booleans()), max_size=60
    ),
    worth=st.floats(0.01, 1),
)
def test_a_second_student_is_asked_from_where_it_is_worth_it(
    texts: list[tuple[float, bool]], worth: float
) -> None:
    confidences, answers = [c for c, _ in texts], [a for _, a in texts]

    def spared(limit: float) -> float:
        return sum(worth - answer for confidence, answer in texts if confidence < limit)

    limit = asked_from(confidences, answers, worth)
    assert limit == 0 or limit in confidences, "no text lies between the two sides"
    assert spared(limit) == pytest.approx(max(0.0, *map(spared, {0.0, *confidences})))


def test_what_holds_the_target_is_not_doubted() -> None:
    leads, agrees = np.linspace(0.01, 1, 2000), np.ones(2000, dtype=bool)
    assert doubted_below(leads, agrees, 0.995) == 0
    agrees[[3, 500, 1000]] = False
    assert doubted_below(leads, agrees, 0.995) == 0, "3 of the 10 that the target leaves"


@given(
    wrong=st.sets(st.integers(0, 1999), max_size=60),
    target=st.sampled_from([0.99, 0.995, 0.999]),
)
def test_doubt_leaves_what_the_target_allows_and_no_less(wrong: set[int], target: float) -> None:
    leads, agrees = np.arange(1, 2001) / 2000, np.ones(2000, dtype=bool)
    agrees[list(wrong)] = False
    limit = doubted_below(leads, agrees, target)

    def bound(below: float) -> float:
        stand = int((~agrees & (leads > below)).sum())
        return (stand + 1 + (stand + 0.75) ** 0.5) / 2000 if stand else 0.0

    assert bound(limit) <= 1 - target + 1e-9
    if limit:
        assert bound(np.nextafter(limit, 0)) > 1 - target, "less doubt would have done"


def test_where_texts_are_few_no_disagreement_stands() -> None:
    assert doubted_below([0.3, 0.1, 0.2], [True, False, False], 0.9) == 0.2
    assert doubted_below([], [], 0.9) == 0
