from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from router.balancing import balanced_assignment, capacity

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def unit(count: int, dimension: int, seed: int) -> Floats:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def assign(points: Floats, centroids: Floats, room: int) -> Ints:
    def search(waiting: Ints, clusters: Ints, count: int) -> tuple[Floats, Ints]:
        scores = points[waiting] @ centroids[clusters].T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(scores, best, axis=1), clusters[best]

    return balanced_assignment(len(points), len(centroids), room, search)


@given(
    st.integers(1, 300), st.integers(1, 40), st.floats(1, 3), st.integers(2, 8), st.integers(0, 999)
)
def test_every_point_has_a_cluster_and_none_too_many(
    points: int, clusters: int, slack: float, dimension: int, seed: int
) -> None:
    room = capacity(points, clusters, slack)
    assignment = assign(unit(points, dimension, seed), unit(clusters, dimension, seed + 1), room)
    sizes = np.bincount(assignment, minlength=clusters)
    assert assignment.min() >= 0
    assert sizes.sum() == points
    assert len(sizes) == clusters
    assert sizes.max() <= room <= math.ceil(slack * points / clusters)


@pytest.mark.parametrize(
    ("points", "clusters", "slack", "most"),
    [(10, 4, 1.0, 3), (12, 4, 1.0, 3), (10, 3, 1.2, 4), (100, 3, 1.1, 37), (1, 5, 1.0, 1)],
)
def test_capacity_is_exact(points: int, clusters: int, slack: float, most: int) -> None:
    assert capacity(points, clusters, slack) == most


def test_with_room_for_all_everybody_gets_the_nearest() -> None:
    points, centroids = unit(200, 5, 0), unit(7, 5, 1)
    assignment = assign(points, centroids, 200)
    np.testing.assert_array_equal(assignment, (points @ centroids.T).argmax(axis=1))


def test_who_loses_most_by_going_elsewhere_stays() -> None:
    """Both points prefer the first centroid; the second point would lose more."""
    centroids = np.float32([[1, 0], [0, 1]])
    points = np.float32([[0.8, 0.6], [1, 0]])
    assert assign(points, centroids, 1).tolist() == [1, 0]


def test_points_crowded_out_of_all_their_candidates_ask_again() -> None:
    """More clusters than a point looks up at a time, and all points at the same place."""
    points = np.repeat(unit(1, 6, 3), 100, axis=0)
    assignment = assign(points, unit(50, 6, 4), 2)
    assert np.bincount(assignment).tolist() == [2] * 50


def test_it_comes_close_to_the_best_assignment_there_is() -> None:
    points, centroids = unit(240, 6, 5), unit(8, 6, 6)
    scores = points @ centroids.T
    rows, places = linear_sum_assignment(-np.repeat(scores, 30, axis=1))
    best = scores[rows, places // 30].mean()
    chance = scores.mean()
    found = scores[np.arange(240), assign(points, centroids, 30)].mean()
    assert found - chance > 0.93 * (best - chance)
