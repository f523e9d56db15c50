"""The score below which the router abstains, and the sureness from which its student is believed.

Both are drawn from held-out text. It is what the experts are meant for, so a cosine lower than all
but a small share of it marks a text that no expert was trained for. Knows nothing of where the
scores come from.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from router.errors import CalibrationError

NEVER = -1.0
"""The threshold that no cosine lies below."""
RECORDED_QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
TRIED_FLOORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
"""Shares of texts that a floor under the estimated score may turn away."""


class Calibration(BaseModel):
    """How the abstention threshold came about; stored with the router."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    threshold: float
    """Cosine below which the router abstains; -1 never abstains."""
    quantile: float
    """Share of held-out text that was to fall below it."""
    heldout_texts: int
    """Texts it was drawn from."""
    score_quantiles: dict[str, float]
    """Quantiles of the held-out scores, by share (`0.05`); empty without held-out text."""


def abstention_threshold(scores: npt.ArrayLike, quantile: float) -> float:
    """The largest threshold below which at most `quantile` of the scores lie.

    With distinct scores exactly floor(quantile * N) of them lie below. A quantile of 0 gives -1:
    the lowest held-out score is no reason to turn away one that is a little lower.

    Args:
        scores: cosines of held-out texts with their nearest centroids, shape (N,).
        quantile: share to turn away, in [0, 1].

    Raises:
        CalibrationError: there are no scores to draw from.
        ValueError: the quantile lies outside [0, 1].
    """
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile {quantile} lies outside [0, 1]")
    if quantile == 0.0:
        return NEVER
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    if ordered.size == 0:
        raise CalibrationError(
            "no held-out text to calibrate abstention on: add documents under data.valid, raise "
            "data.valid_share, or set router.abstain_quantile to 0 to never abstain"
        )
    # The nudge keeps a product such as 0.29 * 100 = 28.999999999999996 at the count it means.
    turned_away = math.floor(quantile * ordered.size + 1e-9)
    if turned_away >= ordered.size:
        return float(np.nextafter(ordered[-1], np.inf))
    return float(ordered[turned_away])


def calibrate(scores: npt.ArrayLike, quantile: float) -> Calibration:
    """The threshold with the record of what it was drawn from; arguments and errors as above."""
    values = np.asarray(scores, dtype=np.float64)
    shares = RECORDED_QUANTILES if values.size else ()
    return Calibration(
        threshold=abstention_threshold(values, quantile),
        quantile=quantile,
        heldout_texts=values.size,
        score_quantiles={str(share): float(np.quantile(values, share)) for share in shares},
    )


class Sureness(BaseModel):
    """From when on a student is believed on one kind of text, and how often it was right then."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    confidence: float | None
    """Least confidence; none: the student is never believed."""
    score: float
    """Least estimated cosine: below it, texts often have no expert."""
    texts: int
    """Texts that both were drawn from, not learnt from by whoever guessed them."""
    answered: float
    """Share of them that the student answers."""
    agreement: float | None
    """Share of these answers that are the embedder's; none without an answer."""
    asked_from: float = 0.0
    """Least confidence of the student before, below which this one is not asked at all."""

    def asks(self, confidence: float) -> bool:
        """Whether the student is asked after one that was so confident."""
        return self.confidence is not None and confidence >= self.asked_from

    def allows(self, confidence: float, score: float) -> bool:
        """Whether the student is believed."""
        return self.confidence is not None and confidence >= self.confidence and score >= self.score


class Before(NamedTuple):
    """Answers that another student has given already, to texts like those that are left."""

    answers: float = 0.0
    wrong: float = 0.0
    """Of them, those that were disagreements."""
    variance: float = 0.0
    """Of `wrong`: less than it where it was estimated from more texts."""


NOTHING_BEFORE = Before()


def sure_from(
    confidences: npt.ArrayLike,
    scores: npt.ArrayLike,
    agrees: npt.ArrayLike,
    *,
    target: float,
    floor: float,
    before: Before = NOTHING_BEFORE,
    deviations: float = 1.0,
) -> Sureness:
    """The limits that let the student answer most while its agreement holds the target.

    What counts is not the agreement measured but its bound: with k disagreements among n answers,
    k + S sqrt(k + 3/4) + (S^2 + 3) / 4, the upper limit of S standard deviations on k (Gehrels
    1986, equation 10), over n must be no more than what the target leaves. So a few lucky texts
    allow nothing: at 99% and one deviation it takes 187 without any disagreement.

    Args:
        confidences: of the student, shape (N,).
        scores: its estimates of the best cosine, shape (N,).
        agrees: whether each of its answers is the embedder's, shape (N,).
        target: least agreement.
        floor: no estimate below it is believed: the threshold of abstention.
        before: answers of another student to other texts; the target is that of all together.
        deviations: S; more where the limits are the best of several that were tried.
    """
    confidence = np.asarray(confidences, dtype=np.float64)
    score = np.asarray(scores, dtype=np.float64)
    right = np.asarray(agrees, dtype=np.bool_)
    best = Sureness(confidence=None, score=floor, texts=right.size, answered=0.0, agreement=None)
    if not right.size:
        return best
    floors = {floor, *(max(floor, float(np.quantile(score, share))) for share in TRIED_FLOORS)}
    for least in sorted(floors):
        kept = score >= least
        count, limit = _most_answers(confidence[kept], right[kept], target, before, deviations)
        if count > best.answered * right.size:
            believed = kept & (confidence >= limit)
            best = Sureness(
                confidence=limit,
                score=least,
                texts=right.size,
                answered=count / right.size,
                agreement=float(right[believed].mean()),
            )
    return best


def asked_from(confidences: npt.ArrayLike, answers: npt.ArrayLike, worth: float) -> float:
    """The confidence of a first student from which on a second one is worth asking.

    Work is saved by each text below it that the second would not answer, and lost by each that it
    would: the limit is that which saves most, an answer counting `1 / worth` times as much as a
    question. So about the limit the second answers a share of `worth`.

    Args:
        confidences: of the first student, in texts that it leaves to the second, shape (N,).
        answers: whether the second answers them.
        worth: share, above 0.
    """
    confidence = np.asarray(confidences, dtype=np.float64)
    order = np.argsort(confidence, kind="stable")
    rising = confidence[order]
    spared = np.cumsum(worth - np.asarray(answers, dtype=np.float64)[order])
    # Equal confidences are on the same side.
    cuts = np.flatnonzero(rising[1:] > rising[:-1])
    if not cuts.size:
        return 0.0
    best = cuts[spared[cuts].argmax()]
    return float(rising[best + 1]) if spared[best] > 0 else 0.0


def _most_answers(
    confidence: npt.NDArray[np.float64],
    right: npt.NDArray[np.bool_],
    target: float,
    before: Before,
    deviations: float,
) -> tuple[int, float]:
    """How many of the most confident answers hold the target, and the least confident of them."""
    order = np.argsort(-confidence, kind="stable")
    falling = confidence[order]
    wrong = np.cumsum(~right[order])
    answers = before.answers + np.arange(1, len(order) + 1)
    bound = _upper_limit(before.wrong + wrong, deviations, before.variance + wrong) / answers
    # Equal confidences are believed together or not at all.
    last = np.append(falling[1:] < falling[:-1], True)[: len(order)]
    good = np.flatnonzero(last & (bound <= 1 - target + 1e-12))
    return (int(good[-1]) + 1, float(falling[good[-1]])) if good.size else (0, 0.0)


def doubted_below(leads: npt.ArrayLike, agrees: npt.ArrayLike, target: float) -> float:
    """The least lead up to which decisions of lower precision must be made again in full, for the
    bound on their disagreements (as in `sure_from`, of one deviation) to hold the target; 0 where
    it holds as they are.

    Where the texts are too few for any bound to hold it, no disagreement is left to stand.

    Args:
        leads: by how much each decision was made, shape (N,).
        agrees: whether it is that of full precision, shape (N,).
        target: least agreement.
    """
    wrong = np.sort(np.asarray(leads, dtype=np.float64)[~np.asarray(agrees, dtype=np.bool_)])
    counts = np.arange(wrong.size + 1)
    allowed = (1 - target) * np.size(leads) + 1e-12
    stand = int(counts[(counts == 0) | (_upper_limit(counts, 1.0) <= allowed)].max())
    return float(wrong[wrong.size - stand - 1]) if stand < wrong.size else 0.0


def _upper_limit(
    wrong: npt.ArrayLike, deviations: float, variance: npt.ArrayLike | None = None
) -> npt.NDArray[np.float64]:
    """Of disagreements, where so many were seen; their variance is their number by default."""
    seen = np.asarray(wrong, dtype=np.float64)
    spread = seen if variance is None else np.asarray(variance, dtype=np.float64)
    limit: npt.NDArray[np.float64] = (
        seen + deviations * np.sqrt(spread + 0.75) + (deviations**2 + 3) / 4
    )
    return limit
