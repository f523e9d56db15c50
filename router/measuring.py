"""From when on students are believed: limits drawn from texts that they have not learnt from.

Knows nothing of how a student learns or guesses, nor of where the texts come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from router.calibration import NOTHING_BEFORE, Before, Sureness, asked_from, sure_from
from router.cascade import Measured, StudentRecord
from router.guess import Guess, is_short

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

TRIED_SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3)
"""Of the disagreements that the target leaves, what a first student may have before a second."""
TRIED_DEVIATIONS = 1.25
"""Certainty of limits that are the best of several."""
ENCODER_WORK = 0.1
"""Of an encoder for a text, as a share of the embedder's: 0.3 where that is exported and 0.03 where
it cannot be, and nobody knows yet where the router will serve."""
WORTH_ASKING = 1 / 6
"""Chance that a second student has to have of answering a text to be asked about it. Where it takes
0.3 of the embedder's time, less than that chance is time lost, and the texts that both leave to the
embedder are the slowest anyway."""
MOST_LOST = 0.02
"""Share of the texts, at the most, that may go without a student's answer for that."""


@dataclass(frozen=True)
class Exam:
    """N texts that nobody who is examined has learnt from."""

    texts: list[str]
    cosines: Vectors
    """The embedder's with every centroid, shape (N, K)."""
    documents: Flags
    """Those that are whole documents, shape (N,); the others are parts of some."""

    @classmethod
    def joined(cls, parts: Sequence[Exam]) -> Exam:
        """All of at least one."""
        return cls(
            [text for part in parts for text in part.texts],
            np.concatenate([part.cosines for part in parts]),
            np.concatenate([part.documents for part in parts]),
        )

    def of(self, rows: Indices) -> Exam:
        """Some of the texts."""
        texts = [self.texts[row] for row in rows]
        return Exam(texts, self.cosines[rows], self.documents[rows])

    def right(self, clusters: Indices, threshold: float) -> Flags:
        """Whether each guess is the embedder's answer, shape (N,); none is where it abstains."""
        named = self.cosines.argmax(axis=1) == clusters
        return np.asarray(named & (self.cosines.max(axis=1) >= threshold), dtype=np.bool_)


@dataclass(frozen=True)
class Terms:
    """What a student is measured by."""

    threshold: float
    """Cosine below which the router abstains."""
    target: float
    """Agreement that is asked for."""
    deviations: float = 1.0
    """Standard deviations by which it must be certain."""


@dataclass(frozen=True)
class Pair:
    """Two students, one asked where the other is not sure."""

    first: StudentRecord
    second: StudentRecord
    work: float
    """Of the embedder's for the same texts, the share that is left with them."""


@dataclass(frozen=True)
class Answers:
    """What was answered of the texts of an exam, each of shape (N,)."""

    sure: Flags
    right: Flags
    """Whether the answer is the embedder's; means nothing where there is none."""

    def of(self, rows: Indices) -> Answers:
        """Those to some of the texts."""
        return Answers(self.sure[rows], self.right[rows])

    def before(self, rows: Flags, texts: int) -> Before:
        """What is to be expected of the answers to so many texts like some of these, held-out and
        training ones taken together."""
        scale = texts / rows.sum() if rows.any() else 0.0
        wrong = int((rows & self.sure & ~self.right).sum())
        return Before(scale * int((rows & self.sure).sum()), scale * wrong, scale**2 * wrong)


@dataclass(frozen=True)
class Earlier:
    """A student that was asked first: its exam, which may be longer, and its answers."""

    exam: Exam
    answers: Answers
    rows: Indices
    """Of that exam, those that are the exam of the next student."""


def measure(
    exam: Exam,
    guesses: Sequence[Guess],
    terms: Terms,
    earlier: Earlier | None = None,
    asked: Flags | None = None,
) -> tuple[StudentRecord, Answers]:
    """From when on a student is believed, and what that comes to.

    A text on which the embedder abstains counts as a disagreement, whatever is guessed.

    Args:
        exam: whose texts were guessed.
        guesses: of each.
        terms: what is asked for.
        earlier: of the student that is asked first; this one answers what that leaves, and the
            target is that of both together.
        asked: of which texts this one is asked at all, shape (N,); none: of all.

    Returns:
        The record, and the answers of both.
    """
    clusters = np.array([guess.cluster for guess in guesses], dtype=np.int64)
    confidences = np.array([guess.confidence for guess in guesses], dtype=np.float64)
    scores = np.array([guess.score for guess in guesses], dtype=np.float64)
    right = exam.right(clusters, terms.threshold)
    short = _short(exam)
    none = np.zeros(len(exam.texts), dtype=np.bool_)
    reached = ~none if asked is None else asked
    done = Answers(none, right) if earlier is None else earlier.answers.of(earlier.rows)

    def limits_of(kind: bool) -> Sureness:
        rows = (short == kind) & ~done.sure & reached
        before = NOTHING_BEFORE
        if earlier is not None:
            alike = _short(earlier.exam) == kind
            before = earlier.answers.before(alike, int((short == kind).sum()))
        return sure_from(
            confidences[rows],
            scores[rows],
            right[rows],
            target=terms.target,
            floor=terms.threshold,
            deviations=terms.deviations,
            before=before,
        )

    brief, long = limits_of(True), limits_of(False)
    believed = np.array(
        [
            (brief if is_brief else long).allows(confidence, score)
            for is_brief, confidence, score in zip(short, confidences, scores, strict=True)
        ],
        dtype=np.bool_,
    )
    own = believed & ~done.sure & reached
    answers = Answers(sure=done.sure | own, right=np.where(done.sure, done.right, right))
    record = StudentRecord(
        target=terms.target,
        short=brief,
        long=long,
        documents=_measured(answers, exam.documents),
        pieces=_measured(answers, ~exam.documents),
        lead_error=_lead_error(
            [g for g, counts in zip(guesses, own, strict=True) if counts],
            exam.cosines[own],
            terms.target,
        ),
        training_texts=0,
        settings={},
    )
    return record, answers


def measure_pair(
    exam: Exam, first: Sequence[Guess], rows: Indices, second: Sequence[Guess], terms: Terms
) -> Pair | None:
    """How sure each of two students must be for the least work, together within the target.

    What the first may get wrong is taken from what is left for the second, which errs less: so the
    first gets a share of it, the best of some that are tried, and is then asked for more certainty.

    Args:
        exam: of the one that is asked first.
        first: its guesses.
        rows: of the exam, those that the other has not learnt from either.
        second: the other's guesses at these, blended with the first ones.
        terms: what is asked for.

    Returns:
        None where no two would leave less work than the first alone.
    """
    strict = replace(terms, deviations=TRIED_DEVIATIONS)
    part = exam.of(rows)
    _, alone = measure(exam, first, terms)
    least = without = float(np.mean(~alone.of(rows).sure))
    best: Pair | None = None
    for share in TRIED_SHARES:
        stricter = replace(strict, target=1 - share * (1 - terms.target))
        one, answers = measure(exam, first, stricter)
        two, both = measure(part, second, strict, Earlier(exam, answers, rows))
        work = _work(~answers.of(rows).sure, both.sure)
        if work < least:
            least, best = work, Pair(one, two, work)
            chosen = Earlier(exam, answers, rows), both
    if best is None:
        return None
    earlier, both = chosen
    confidences = np.array([first[row].confidence for row in rows], dtype=np.float64)
    floors = _asked_from(part, earlier, both, confidences)
    asked = confidences >= np.where(_short(part), floors[1], floors[0])
    two, fewer = measure(part, second, strict, earlier, asked)
    work = _work(~earlier.answers.of(rows).sure & asked, fewer.sure)
    # With fewer answers to prove it by, a second student may not hold the target any more.
    if np.mean(both.sure) - np.mean(fewer.sure) > MOST_LOST or work >= without:
        return best
    limits = {
        "long": two.long.model_copy(update={"asked_from": floors[0]}),
        "short": two.short.model_copy(update={"asked_from": floors[1]}),
    }
    return Pair(best.first, two.model_copy(update=limits), work)


def _asked_from(
    exam: Exam, earlier: Earlier, both: Answers, confidences: Floats
) -> tuple[float, float]:
    """The confidences of a first student from which on a second is asked: long texts, short ones.

    Args:
        exam: the second student's.
        earlier: the first one.
        both: what they would answer together, were the second asked about all that is left.
        confidences: of the first in these texts, shape (N,).
    """
    short, left = _short(exam), ~earlier.answers.of(earlier.rows).sure

    def least(rows: Flags) -> float:
        return asked_from(confidences[rows], both.sure[rows], WORTH_ASKING)

    return least(left & ~short), least(left & short)


def _work(asked: Flags, both: Flags) -> float:
    """Share of the embedder's work that is left where two students answer some texts, the second
    being asked about some."""
    return ENCODER_WORK * float(np.mean(asked)) + float(np.mean(~both))


def _short(exam: Exam) -> Flags:
    return np.array([is_short(text) for text in exam.texts], dtype=np.bool_)


def _measured(answers: Answers, rows: Flags) -> Measured:
    count, answered = int(rows.sum()), int((answers.sure & rows).sum())
    return Measured(
        texts=count,
        answered=answered / count if count else 0.0,
        agreement=float(answers.right[answers.sure & rows].mean()) if answered else None,
    )


def _lead_error(guesses: Sequence[Guess], cosines: Vectors, target: float) -> float:
    """What the winner's estimated lead over the runner-up is off by, at most in `target` of all."""
    if not guesses:
        return 0.0
    first, second = (np.array([g.clusters[place] for g in guesses]) for place in (0, 1))
    leads = np.array([g.scores[0] - g.scores[1] for g in guesses])
    rows = np.arange(len(guesses))
    true = cosines[rows, first] - cosines[rows, second]
    return float(np.quantile(np.abs(leads - true), target))
