"""A guess at what the embedder would say of a text, and how it is read from a student's logits.

Knows nothing of how the logits came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

TEMPERATURE = 0.05
"""Logits times this are estimates of cosines."""
BLEND = 0.25
"""Weight of a first student's estimates beside those of a second one, which errs elsewhere."""
TOP = 16
"""Best clusters that a guess names."""
SHORT_CHARACTERS = 120
"""Up to here a text is short, as questions are: there is less in it to be sure by."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What the embedder probably says of one text."""

    cluster: int
    """The cluster whose centroid is nearest, by estimate."""
    confidence: float
    """In [0, 1], growing with the chance that the embedder names the same cluster."""
    score: float
    """Estimate of the cosine of the text and that centroid, in [-1, 1]."""
    scores: Floats
    """Estimates for the best clusters, falling, shape (min(K, `TOP`),)."""
    clusters: Indices
    """The clusters of `scores`."""


def is_short(text: str) -> bool:
    """Whether a text is judged as short ones are."""
    return len(text) <= SHORT_CHARACTERS


def best_logits(logits_NK: Floats) -> tuple[Floats, Indices]:
    """The `TOP` best logits of N texts, falling, and their clusters: of shape (N, T)."""
    rows_N1 = np.arange(len(logits_NK))[:, None]
    if logits_NK.shape[1] <= TOP:
        best_NT = (-logits_NK).argsort(axis=1, kind="stable")
    else:
        some_NT = np.argpartition(logits_NK, -TOP, axis=1)[:, -TOP:]
        order_NT = (-logits_NK[rows_N1, some_NT]).argsort(axis=1, kind="stable")
        best_NT = some_NT[rows_N1, order_NT]
    return logits_NK[rows_N1, best_NT], best_NT


def guesses_of(values_NT: Floats, best_NT: Indices, confidences: Floats) -> list[Guess]:
    """Guesses of N texts from their best logits and how sure each is."""
    scores_NT = estimates_of(values_NT)
    return [
        Guess(int(best[0]), confidence, float(scores[0]), scores, best)
        for best, confidence, scores in zip(best_NT, confidences.tolist(), scores_NT, strict=True)
    ]


def estimates_of(values_NT: Floats) -> Floats:
    """The cosines that logits stand for."""
    # `np.clip` takes several times as long for so few numbers.
    scores_NT: Floats = np.minimum(np.maximum(values_NT * np.float32(TEMPERATURE), -1), 1)
    return scores_NT


def lead_confidences(values_NT: Floats) -> Floats:
    """How sure guesses are by the lead of their best logit alone, shape (N,)."""
    if values_NT.shape[1] < 2:
        return np.ones(len(values_NT), dtype=np.float32)
    chances: Floats = 1 / (1 + np.exp(values_NT[:, 1] - values_NT[:, 0]))
    return chances


def blended(firsts: Sequence[Guess], scores_NT: Floats, best_NT: Indices) -> tuple[Floats, Indices]:
    """What two students make of N texts together; of the clusters that the second names.

    A cluster that the first does not name has no more than the least score that it gives.

    Args:
        firsts: the first student's guesses.
        scores_NT: the second's estimates.
        best_NT: the clusters of these.

    Returns:
        Estimates, falling, and their clusters, both of shape (N, T).
    """
    others_NT = np.array(
        [
            _estimates(first, clusters)
            for first, clusters in zip(firsts, best_NT.tolist(), strict=True)
        ],
        dtype=np.float32,
    )
    both_NT = (1 - BLEND) * scores_NT + BLEND * others_NT
    order_NT = (-both_NT).argsort(axis=1, kind="stable")
    rows_N1 = np.arange(len(order_NT))[:, None]
    return both_NT[rows_N1, order_NT], best_NT[rows_N1, order_NT]


def _estimates(guess: Guess, clusters: list[int]) -> list[float]:
    scores = guess.scores.tolist()
    known = dict(zip(guess.clusters.tolist(), scores, strict=True))
    return [known.get(cluster, scores[-1]) for cluster in clusters]
