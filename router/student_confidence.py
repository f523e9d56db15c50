"""How sure the student may be: a logistic regression over what can be seen of one guess.

Knows nothing of texts or layers, and sets no threshold.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

MEASURES = 5
"""Things seen of a guess; one more number of a confidence is its constant."""

UNFITTED: Floats = np.array([1, 0, 0, 0, 0, 0], dtype=np.float32)
"""Sure by the margin alone, for want of held-out text."""

RIDGE = 1.0
ROUNDS = 25
LARGEST = 30.0
SMALLEST = np.float32(np.exp(-LARGEST))


def measures_of(logits_NK: Floats, best_NT: Floats, unknown_N: Floats, words_N: Indices) -> Floats:
    """What is seen of N guesses, shape (N, `MEASURES`).

    Args:
        logits_NK: of all clusters.
        best_NT: the best logits, falling, T at least 2 where K is.
        unknown_N: share of a text's features that were never seen.
        words_N: words of each text.
    """
    first_N = best_NT[:, 0]
    margin_N = first_N - best_NT[:, 1] if best_NT.shape[1] > 1 else np.full_like(first_N, LARGEST)
    # The log odds of the best against all others together.
    total_N = np.exp(logits_NK - first_N[:, None]).sum(axis=1)
    odds_N = -np.log(np.maximum(total_N - 1, SMALLEST))
    margin_N = np.minimum(margin_N, LARGEST)
    measures = np.empty((len(first_N), MEASURES), dtype=np.float32)
    measures[:, 0] = margin_N
    measures[:, 1] = odds_N
    measures[:, 2] = unknown_N
    measures[:, 3] = np.log(words_N)
    measures[:, 4] = margin_N * unknown_N
    return measures


def confidence_of(measures: Floats, coefficients: Floats) -> Floats:
    """Chance that each guess is right, shape (N,)."""
    sums = measures @ coefficients[:-1] + coefficients[-1]
    # `np.clip` takes several times as long for so few numbers.
    chances: Floats = 1 / (1 + np.exp(-np.minimum(np.maximum(sums, -LARGEST), LARGEST)))
    return chances


def fit_confidence(measures: Floats, right: npt.NDArray[np.bool_]) -> Floats:
    """Coefficients from guesses and whether each was right: ridge regression by Newton's method."""
    mean, spread = measures.mean(axis=0, dtype=np.float64), measures.std(axis=0, dtype=np.float64)
    spread = np.where(spread > 1e-6, spread, 1.0)
    inputs = np.column_stack([(measures - mean) / spread, np.ones(len(measures))])
    penalty = np.diag([RIDGE] * MEASURES + [1e-3])
    weights = np.zeros(MEASURES + 1)
    for _ in range(ROUNDS):
        chances = 1 / (1 + np.exp(-np.clip(inputs @ weights, -LARGEST, LARGEST)))
        slope = inputs.T @ (right - chances) - penalty @ weights
        curve = (inputs * (chances * (1 - chances))[:, None]).T @ inputs + penalty
        weights = weights + np.linalg.solve(curve, slope)
    plain = weights[:-1] / spread
    return np.append(plain, weights[-1] - plain @ mean).astype(np.float32)
