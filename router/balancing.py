"""Assignment of points to clusters that may each take only so many.

Knows nothing of k-means or of how nearest centroids are found: the search is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

Search = Callable[[Ints, Ints, int], tuple[Floats, Ints]]
"""Numbers of points (N,), numbers of the clusters they may go to, and m: to the cosines of the m
best, falling, and the numbers of these, both of shape (N, m)."""

CANDIDATES = 16
"""Nearest open clusters looked up for a point at a time; it asks again when all have filled up."""


def capacity(points: int, clusters: int, slack: float) -> int:
    """Most points a cluster may take: ceil(slack * points / clusters), `slack` 1 or more."""
    # Rounding must neither add a place to an exact quotient nor leave too few for all.
    return max(-(-points // clusters), math.ceil(slack * points / clusters - 1e-9))


def balanced_assignment(points: int, clusters: int, room: int, search: Search) -> Ints:
    """Assign every point to a near cluster, none with more than `room` points.

    The balanced step of c-BTM's clustering (arXiv 2303.14177, section 2) and of BASE layers
    (arXiv 2103.16716), which solve it by auction. Here it is greedy by regret (Martello and Toth,
    Knapsack Problems, 1990, chapter 7): each round every waiting point asks its best cluster that
    has room, and a cluster asked by too many takes those that would lose most by going elsewhere.
    Every round ends with all points placed or one more cluster full, and asks only about points
    still waiting, so millions of points over thousands of clusters take a few dozen rounds.

    Args:
        points: how many, N.
        clusters: how many, K.
        room: most points of a cluster; N / K or more.
        search: finds the nearest clusters of points.

    Returns:
        The cluster of each point, shape (N,). The same input gives the same answer.
    """
    assert room * clusters >= points
    places = np.full(clusters, room, dtype=np.int64)
    assignment = np.full(points, -1, dtype=np.int64)
    waiting = np.arange(points)
    while waiting.size:
        open_clusters = np.flatnonzero(places)
        scores, found = search(waiting, open_clusters, min(CANDIDATES, len(open_clusters)))
        waiting = _place(waiting, scores, found, places, assignment)
    return assignment


def _place(waiting: Ints, scores: Floats, candidates: Ints, places: Ints, assignment: Ints) -> Ints:
    """Rounds of asking and taking; fills `places` and `assignment`, returns who ran out of
    candidates. `scores` and `candidates` have a row for each waiting point, best first."""
    out_of_candidates: list[Ints] = []
    while waiting.size:
        has_room = places[candidates] > 0
        stranded = ~has_room.any(axis=1)
        if stranded.any():
            out_of_candidates.append(waiting[stranded])
            keep = ~stranded
            waiting, scores, candidates = waiting[keep], scores[keep], candidates[keep]
            has_room = has_room[keep]
        wish = has_room.argmax(axis=1)
        rows = np.arange(len(waiting))
        target = candidates[rows, wish]
        taken = _take(target, _regret(scores, has_room, wish), places)
        assignment[waiting[taken]] = target[taken]
        places -= np.bincount(target[taken], minlength=len(places))
        waiting, scores, candidates = waiting[~taken], scores[~taken], candidates[~taken]
    return np.sort(np.concatenate(out_of_candidates)) if out_of_candidates else waiting


def _regret(scores: Floats, has_room: npt.NDArray[np.bool_], wish: Ints) -> Floats:
    """What each point loses by its second choice; the last candidate bounds one not looked up."""
    rows = np.arange(len(scores))
    others = has_room.copy()
    others[rows, wish] = False
    second = np.where(others.any(axis=1), others.argmax(axis=1), scores.shape[1] - 1)
    regret: Floats = scores[rows, wish] - scores[rows, second]
    return regret


def _take(target: Ints, regret: Floats, places: Ints) -> npt.NDArray[np.bool_]:
    """Which points their targets take: as many as have room, the largest regret first."""
    order = np.lexsort((-regret, target))
    sorted_target = target[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_target, sorted_target)
    taken = np.zeros(len(order), dtype=np.bool_)
    taken[order] = rank < places[sorted_target]
    return taken
