"""Clusters that say the same become one.

Two experts whose centroids nearly coincide split each other's text and swap requests at random.
Knows nothing of texts or of how the centroids came about.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROUNDING = 1e-9
"""Keeps equal centroids equal where their cosine comes out a last digit below 1."""


def merge_near_duplicates(
    centroids: npt.NDArray[np.float32], weights: npt.ArrayLike, cosine: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Agglomerate centroids until no pair has at least `cosine`, the nearest pair first.

    A pair becomes its mean by mass, on the unit sphere, and may merge again: centroid-linkage
    agglomeration (Murtagh and Contreras 2012, arXiv 1105.0121, section 2) with a cut-off. Without
    ties the result does not depend on the order of the rows.

    Args:
        centroids: shape (K, D), rows of unit length.
        weights: mass of each, shape (K,), above 0.
        cosine: least cosine of a pair that merges, in [-1, 1]; 1 merges equal ones alone.

    Returns:
        The merged centroids, shape (M, D), M <= K, in the order of their first member; and where
        each old one went, shape (K,).
    """
    vectors = centroids.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    masses = np.array(weights, dtype=np.float64)
    owner = np.arange(len(vectors))
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    while True:
        first, second = sorted(np.unravel_index(int(similarity.argmax()), similarity.shape))
        if similarity[first, second] < cosine - ROUNDING:
            break
        vectors[first] = _mean(vectors[[first, second]], masses[[first, second]])
        masses[first] += masses[second]
        owner[owner == second] = first
        # -inf marks a centroid's cosine with itself and with those merged away.
        alive = np.isfinite(similarity[first])
        row = np.where(alive, vectors @ vectors[first], -np.inf)
        similarity[first], similarity[:, first] = row, row
        similarity[second], similarity[:, second] = -np.inf, -np.inf
    kept, mapping = np.unique(owner, return_inverse=True)
    return vectors[kept].astype(np.float32), mapping.astype(np.int64)


def _mean(
    pair: npt.NDArray[np.float64], masses: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean by mass of two unit vectors, of unit length; the heavier one where they cancel out."""
    mean: npt.NDArray[np.float64] = masses @ pair
    length = float(np.linalg.norm(mean))
    if length < ROUNDING * float(masses.sum()):
        heavier: npt.NDArray[np.float64] = pair[int(masses.argmax())]
        return heavier
    return mean / length
