"""Limits of one student and of two, on made-up guesses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from router import measuring
from router.guess import Guess, is_short
from router.measuring import (
    ENCODER_WORK,
    Earlier,
    Exam,
    Terms,
    measure,
    measure_pair,
)


def exam_of(clusters: npt.NDArray[np.int64], text: str = "a short question") -> Exam:
    """Documents whose embeddings are centroids, of four clusters."""
    cosines = np.eye(4, dtype=np.float32)[clusters]
    return Exam([text] * len(clusters), cosines, np.ones(len(clusters), dtype=np.bool_))


def guessed(
    rng: np.random.Generator, clusters: npt.NDArray[np.int64], hardness: float
) -> list[Guess]:
    """Guesses that are the less sure the likelier they are wrong."""
    confidences = rng.random(len(clusters))
    wrong = rng.random(len(clusters)) < hardness * (1 - confidences) ** 2
    return [
        Guess(
            cluster=int(cluster + miss) % 4,
            confidence=float(confidence),
            score=0.9,
            scores=np.array([0.9, 0.1], dtype=np.float32),
            clusters=np.array([(cluster + miss) % 4, (cluster + miss + 1) % 4]),
        )
        for cluster, miss, confidence in zip(clusters, wrong, confidences, strict=True)
    ]


def test_a_second_student_takes_over_where_it_answers_more() -> None:
    rng = np.random.default_rng(0)
    clusters = rng.integers(4, size=6000)
    exam = exam_of(clusters)
    rows = np.arange(len(clusters))
    terms = Terms(threshold=0.5, target=0.99)
    first, second = guessed(rng, clusters, 0.5), guessed(rng, clusters, 0.05)
    alone, _ = measure(exam, first, terms)
    pair = measure_pair(exam, first, rows, second, terms)
    assert pair is not None
    assert pair.second.documents.answered > alone.documents.answered + 0.2
    assert pair.second.documents.agreement is not None
    assert pair.second.documents.agreement >= 0.99
    assert pair.first.documents.answered <= alone.documents.answered
    assert pair.first.target >= terms.target
    left = 1 - pair.first.documents.answered, 1 - pair.second.documents.answered
    assert pair.work == pytest.approx(ENCODER_WORK * left[0] + left[1])
    assert measure_pair(exam, first, rows, guessed(rng, clusters, 20.0), terms) is None
    certain = Terms(threshold=0.5, target=1.0)
    assert measure_pair(exam, first, rows, second, certain) is None


def test_two_are_kept_where_they_leave_less_work_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    clusters = rng.integers(4, size=6000)
    exam, rows, terms = exam_of(clusters), np.arange(6000), Terms(threshold=0.5, target=0.99)
    first, second = guessed(rng, clusters, 0.5), guessed(rng, clusters, 0.2)
    left = 1 - measure(exam, first, terms)[0].documents.answered
    shares = []
    for cost in (0.0, 0.1, 0.2, 0.4, 2.0):
        monkeypatch.setattr(measuring, "ENCODER_WORK", cost)
        pair = measure_pair(exam, first, rows, second, terms)
        assert pair is None or pair.work < left
        shares.append(0.0 if pair is None else pair.second.documents.answered)
    assert shares == sorted(shares, reverse=True), "the dearer the second, the less it is asked"
    assert shares[0] > 1 - left
    assert shares[-1] == 0, "what costs more than the embedder is not kept"


def test_a_second_student_is_measured_on_fewer_texts() -> None:
    """What is expected of the first one there is known from all: luck on the few does not count."""
    rng = np.random.default_rng(1)
    exam = exam_of(rng.integers(4, size=8000))
    first = guessed(rng, exam.cosines.argmax(axis=1), 0.5)
    terms = Terms(threshold=0.5, target=0.99)
    _, answers = measure(exam, first, terms)
    rows = np.sort(rng.permutation(8000)[:2000])
    second = guessed(rng, exam.cosines.argmax(axis=1)[rows], 0.05)
    record, both = measure(exam.of(rows), second, terms, Earlier(exam, answers, rows))
    assert (both.sure >= answers.sure[rows]).all()
    assert record.short.texts == (~answers.sure[rows]).sum()
    before = answers.before(np.ones(8000, dtype=np.bool_), 2000)
    wrong = (answers.sure & ~answers.right).sum()
    assert before == pytest.approx((answers.sure.sum() / 4, wrong / 4, wrong / 16))
    pair = measure_pair(exam, first, rows, second, terms)
    assert pair is not None
    assert pair.second.documents.texts == 2000
    assert pair.second.documents.answered > pair.first.documents.answered


def test_a_second_student_is_not_asked_what_it_would_hardly_ever_be_sure_of() -> None:
    rng = np.random.default_rng(4)
    clusters = rng.integers(4, size=6000)
    exam, rows, terms = exam_of(clusters), np.arange(6000), Terms(threshold=0.5, target=0.99)
    first, second = guessed(rng, clusters, 0.5), guessed(rng, clusters, 0.05)
    hopeless = np.array([guess.confidence < 0.1 for guess in first])
    second = [
        replace(guess, confidence=0.0) if vain else guess
        for guess, vain in zip(second, hopeless, strict=True)
    ]
    pair = measure_pair(exam, first, rows, second, terms)
    assert pair is not None
    floor = pair.second.short.asked_from
    assert pair.second.long.asked_from == 0.0, "of long texts there are none"
    below = np.array([guess.confidence < floor for guess in first])
    assert below[hopeless].all()
    confidence = pair.second.short.confidence
    assert confidence is not None
    would = np.array([guess.confidence >= confidence for guess in second])
    assert (below & ~hopeless).sum() <= 10, "of the others it answers many more than a sixth"
    done = np.array([pair.first.short.allows(guess.confidence, guess.score) for guess in first])
    assert pair.second.short.texts == (~done & ~below).sum()
    assert pair.second.documents.answered == pytest.approx((done | (would & ~below)).mean())


@pytest.mark.parametrize("texts", [600, 1000, 2000, 6000])
def test_leaving_texts_out_never_costs_the_second_student_its_place(texts: int) -> None:
    """Limits drawn from fewer answers may prove less, or nothing."""
    found = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        clusters = rng.integers(4, size=texts)
        exam, rows, terms = exam_of(clusters), np.arange(texts), Terms(threshold=0.5, target=0.99)
        first, second = guessed(rng, clusters, 0.5), guessed(rng, clusters, 0.1)
        pair = measure_pair(exam, first, rows, second, terms)
        if pair is None:
            continue
        found += 1
        alone = measure(exam, first, terms)[0].documents.answered
        assert pair.work < 1 - alone
        assert pair.second.short.confidence is not None
        assert pair.second.documents.answered > pair.first.documents.answered
        asked = np.mean(
            [
                not pair.first.short.allows(guess.confidence, guess.score)
                and pair.second.short.asks(guess.confidence)
                for guess in first
            ]
        )
        left = 1 - pair.second.documents.answered
        assert pair.work == pytest.approx(ENCODER_WORK * asked + left)
    assert found


def test_texts_of_a_kind_that_nobody_has_asked_before_have_nothing_before_them() -> None:
    rng = np.random.default_rng(2)
    clusters = rng.integers(4, size=1000)
    exam = Exam.joined([exam_of(clusters), exam_of(clusters[:300], "a long one " * 20)])
    assert [is_short(exam.texts[0]), is_short(exam.texts[-1])] == [True, False]
    guesses = guessed(rng, exam.cosines.argmax(axis=1), 0.0)
    record, answers = measure(exam, guesses, Terms(threshold=0.5, target=0.99))
    assert (record.short.texts, record.long.texts) == (1000, 300)
    assert answers.sure.all()
    abstaining, answers = measure(exam, guesses, Terms(threshold=1.1, target=0.99))
    assert abstaining.short.confidence is None, "where the embedder abstains nobody is right"
    assert answers.before(np.zeros(1300, dtype=np.bool_), 10) == (0, 0, 0)
