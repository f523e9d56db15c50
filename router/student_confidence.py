"""How sure the student may be: a logistic regression over what can be seen of one guess.

Some clusters are told apart more easily than others, and a document more easily than a question, so
each cluster has a constant of its own, and short texts have other coefficients than long ones.
Knows nothing of texts or layers, and sets no threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.guess import TEMPERATURE, Guess, guesses_of, is_short

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

MEASURES = 6
"""Things seen of a student's guess. A confidence has a coefficient for each, a constant, and a
constant for each cluster."""
MEASURES_OF_TWO = 2
"""Things seen of a guess that two students made together."""
KINDS = 2
"""Rows of coefficients: for long texts and for short ones."""
LEAST_FITTED = 100
"""Texts of a kind from which on it has coefficients of its own."""

PARTS = 5
"""Of the texts, each judged by what was fitted on the others."""
RIDGE = 1.0
ROUNDS = 25
LARGEST = 30.0
SMALLEST = np.float32(np.exp(-LARGEST))


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of the guesses at N texts, before anybody says how sure they are."""

    values_NT: Floats
    """Their best logits, falling."""
    best_NT: Indices
    """The clusters of these."""
    measures_NM: Floats
    """The margin first."""
    short_N: Flags
    """Whether the text is short."""

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """All of at least one."""
        return cls(
            np.concatenate([part.values_NT for part in parts]),
            np.concatenate([part.best_NT for part in parts]),
            np.concatenate([part.measures_NM for part in parts]),
            np.concatenate([part.short_N for part in parts]),
        )

    @property
    def clusters_N(self) -> Indices:
        """The cluster that each guess names."""
        return self.best_NT[:, 0]

    def of(self, rows: Flags) -> Seen:
        """Some of the texts."""
        return Seen(
            self.values_NT[rows], self.best_NT[rows], self.measures_NM[rows], self.short_N[rows]
        )

    def guesses(self, confidences_N: Floats) -> list[Guess]:
        """The guesses, so sure."""
        return guesses_of(self.values_NT, self.best_NT, confidences_N)


def shape_of(measures: int, clusters: int) -> tuple[int, int]:
    """Of the coefficients for so many measures and clusters."""
    return KINDS, measures + 1 + clusters


def unfitted(clusters: int, measures: int = MEASURES) -> Floats:
    """Sure by the margin alone, for want of texts that nobody has learnt from."""
    coefficients = np.zeros(shape_of(measures, clusters), dtype=np.float32)
    coefficients[:, 0] = 1
    return coefficients


def seen_of_two(scores_NT: Floats, best_NT: Indices, texts: Sequence[str]) -> Seen:
    """What is seen of the estimates that two students made together at texts: margin and score."""
    values_NT = scores_NT / np.float32(TEMPERATURE)
    measures_NM = np.empty((len(scores_NT), MEASURES_OF_TWO), dtype=np.float32)
    measures_NM[:, 0] = _margins(values_NT)
    measures_NM[:, 1] = scores_NT[:, 0]
    short_N = np.array([is_short(text) for text in texts], dtype=np.bool_)
    return Seen(values_NT, best_NT, measures_NM, short_N)


def measures_of(logits_NK: Floats, best_NT: Floats, unknown_N: Floats, words_N: Indices) -> Floats:
    """What is seen of N guesses, shape (N, `MEASURES`).

    Args:
        logits_NK: of all clusters.
        best_NT: the best logits, falling, T at least 2 where K is.
        unknown_N: share of a text's features that were never seen.
        words_N: words of each text.
    """
    first_N = best_NT[:, 0]
    margin_N = _margins(best_NT)
    # The log odds of the best against all others together.
    total_N = np.exp(logits_NK - first_N[:, None]).sum(axis=1)
    odds_N = -np.log(np.maximum(total_N - 1, SMALLEST))
    measures = np.empty((len(first_N), MEASURES), dtype=np.float32)
    measures[:, 0] = margin_N
    measures[:, 1] = odds_N
    measures[:, 2] = unknown_N
    measures[:, 3] = np.log(words_N)
    measures[:, 4] = margin_N * unknown_N
    measures[:, 5] = first_N * TEMPERATURE
    return measures


def _margins(best_NT: Floats) -> Floats:
    """By how much the best logits lead; `LARGEST` at the most, and where there is no other."""
    first_N = best_NT[:, 0]
    if best_NT.shape[1] == 1:
        return np.full_like(first_N, LARGEST)
    margins_N: Floats = np.minimum(first_N - best_NT[:, 1], LARGEST)
    return margins_N


def confidence_of(seen: Seen, coefficients: Floats) -> Floats:
    """Chance that each guess is right, shape (N,)."""
    kinds_N, measures = seen.short_N.astype(np.int64), seen.measures_NM.shape[1]
    own_NM = coefficients[kinds_N, :measures]
    sums_N = (seen.measures_NM * own_NM).sum(axis=1)
    sums_N += coefficients[kinds_N, measures]
    sums_N += coefficients[kinds_N, measures + 1 + seen.clusters_N]
    # `np.clip` takes several times as long for so few numbers.
    chances: Floats = 1 / (1 + np.exp(-np.minimum(np.maximum(sums_N, -LARGEST), LARGEST)))
    return chances


def fit_confidence(seen: Seen, right: Flags, clusters: int) -> Floats:
    """Coefficients from guesses at texts that were not learnt from, and whether each was right.

    Where texts of one kind are too few, those of the other count for them.

    Args:
        seen: of N guesses.
        right: shape (N,).
        clusters: K.

    Returns:
        As `shape_of` says.
    """
    if len(right) < LEAST_FITTED:
        return unfitted(clusters, seen.measures_NM.shape[1])
    coefficients = []
    for kind in range(KINDS):
        rows = seen.short_N == bool(kind)
        if rows.sum() < LEAST_FITTED:
            rows = np.ones(len(right), dtype=np.bool_)
        coefficients.append(
            _fitted(seen.measures_NM[rows], seen.clusters_N[rows], right[rows], clusters)
        )
    return np.stack(coefficients)


def unseen_confidence(seen: Seen, right: Flags, clusters: int) -> Floats:
    """Chance that each guess is right, by coefficients that were fitted on others, shape (N,).

    Limits are to be drawn from these: a constant of a cluster knows the luck of the few texts that
    it was fitted on, and of 1,000 clusters' a limit would promise 99% and keep 98.

    Args:
        seen: of N guesses, in an order that says nothing of them but what they are made at.
        right: shape (N,).
        clusters: K.
    """
    confidences_N = np.zeros(len(right), dtype=np.float32)
    parts_N = np.arange(len(right)) % PARTS
    for part in range(PARTS):
        rows = parts_N == part
        coefficients = fit_confidence(seen.of(~rows), right[~rows], clusters)
        confidences_N[rows] = confidence_of(seen.of(rows), coefficients)
    return confidences_N


def _fitted(measures_NM: Floats, clusters_N: Indices, right_N: Flags, clusters: int) -> Floats:
    """Ridge regression by Newton's method; a step takes time linear in the clusters, since of two
    clusters' constants none depends on the other directly."""
    mean, spread = measures_NM.mean(axis=0, dtype=np.float64), measures_NM.std(axis=0, dtype=float)
    spread = np.where(spread > 1e-6, spread, 1.0)
    inputs_NC = np.column_stack([(measures_NM - mean) / spread, np.ones(len(measures_NM))])
    penalty_CC = np.diag([RIDGE] * len(spread) + [1e-3])
    weights_C, constants_K = np.zeros(len(penalty_CC)), np.zeros(clusters)

    def by_cluster(values_N: Doubles) -> Doubles:
        sums: Doubles = np.bincount(clusters_N, values_N, clusters).astype(np.float64, copy=False)
        return sums

    for _ in range(ROUNDS):
        sums_N = inputs_NC @ weights_C + constants_K[clusters_N]
        chances_N = 1 / (1 + np.exp(-np.clip(sums_N, -LARGEST, LARGEST)))
        curves_N = chances_N * (1 - chances_N)
        slope_C = inputs_NC.T @ (right_N - chances_N) - penalty_CC @ weights_C
        slope_K = by_cluster(right_N - chances_N) - RIDGE * constants_K
        curve_CC = (inputs_NC * curves_N[:, None]).T @ inputs_NC + penalty_CC
        curve_K = by_cluster(curves_N) + RIDGE
        mixed_CK = np.stack([by_cluster(curves_N * inputs_N) for inputs_N in inputs_NC.T])
        # The constants are eliminated, their block of the curvature being diagonal.
        scaled_CK = mixed_CK / curve_K
        step_C = np.linalg.solve(curve_CC - scaled_CK @ mixed_CK.T, slope_C - scaled_CK @ slope_K)
        weights_C += step_C
        constants_K += (slope_K - mixed_CK.T @ step_C) / curve_K
    plain = weights_C[:-1] / spread
    constant = weights_C[-1] - plain @ mean
    return np.concatenate([plain, [constant], constants_K], dtype=np.float32, casting="same_kind")
