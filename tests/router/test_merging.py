from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from router.merging import merge_near_duplicates

Floats = npt.NDArray[np.float32]


def unit(rows: npt.ArrayLike) -> Floats:
    vectors = np.asarray(rows, dtype=np.float64)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Centroids around a few directions, so that some pairs are near, and their masses."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, dimension = draw(st.integers(1, 24)), draw(st.integers(2, 8))
    directions = rng.standard_normal((draw(st.integers(1, 5)), dimension))
    noise = 0.3 * rng.standard_normal((count, dimension))
    vectors = directions[rng.integers(len(directions), size=count)] + noise
    return unit(vectors), rng.integers(1, 1000, size=count)


thresholds = st.floats(0.5, 0.999)


@given(clusters(), thresholds)
def test_what_is_left_is_far_apart_and_of_unit_length(
    given_: tuple[Floats, npt.NDArray[np.int64]], cosine: float
) -> None:
    merged, mapping = merge_near_duplicates(*given_, cosine)
    similarity = merged @ merged.T - 2 * np.eye(len(merged))
    assert similarity.max() < cosine + 1e-6
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), 1, atol=1e-6)
    assert merged.dtype == np.float32
    assert set(mapping.tolist()) == set(range(len(merged)))


@given(clusters(), thresholds)
def test_merging_again_changes_nothing(
    given_: tuple[Floats, npt.NDArray[np.int64]], cosine: float
) -> None:
    merged, mapping = merge_near_duplicates(*given_, cosine)
    masses = np.bincount(mapping, weights=given_[1])
    again, same = merge_near_duplicates(merged, masses, cosine)
    np.testing.assert_allclose(again, merged, atol=1e-6)
    assert same.tolist() == list(range(len(merged)))


@given(clusters(), thresholds, st.randoms(use_true_random=False))
def test_the_order_of_the_clusters_does_not_matter(
    given_: tuple[Floats, npt.NDArray[np.int64]], cosine: float, random: object
) -> None:
    centroids, masses = given_
    order = np.arange(len(centroids))
    random.shuffle(order)  # type: ignore[attr-defined]
    merged, mapping = merge_near_duplicates(centroids, masses, cosine)
    other, other_mapping = merge_near_duplicates(centroids[order], masses[order], cosine)
    np.testing.assert_allclose(other[other_mapping], merged[mapping[order]], atol=1e-5)


def test_a_pair_becomes_its_mean_by_mass() -> None:
    merged, mapping = merge_near_duplicates(unit([[1, 0], [0, 1], [1, 0.1]]), [3, 5, 1], 0.9)
    heavy, light = unit([[1, 0], [1, 0.1]])
    np.testing.assert_allclose(merged[0], unit([3 * heavy + light])[0], atol=1e-6)
    np.testing.assert_allclose(merged[1], [0, 1], atol=1e-6)
    assert mapping.tolist() == [0, 1, 0]


def test_what_has_merged_may_merge_again() -> None:
    angles = np.radians([0, 10, 24])
    fan = unit(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    merged, mapping = merge_near_duplicates(fan, [1, 9, 1], float(np.cos(np.radians(20))))
    assert len(merged) == 1
    assert mapping.tolist() == [0, 0, 0]


def test_the_nearest_pair_goes_first() -> None:
    angles = np.radians([0, 14, 24])
    fan = unit(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    _, mapping = merge_near_duplicates(fan, [1, 1, 1], float(np.cos(np.radians(15))))
    assert mapping.tolist() == [0, 1, 1]


def test_a_cosine_of_one_merges_equal_centroids_alone() -> None:
    thirds = unit([[1, 2, 3], [1, 2, 3], [1, 2, 3.01]])
    _, mapping = merge_near_duplicates(thirds, [1, 1, 1], 1.0)
    assert mapping.tolist() == [0, 0, 1]


def test_opposites_that_cancel_out_leave_the_heavier() -> None:
    merged, _ = merge_near_duplicates(unit([[1, 0], [-1, 0]]), [1, 1], -1.0)
    np.testing.assert_allclose(merged, [[1, 0]])


def test_a_single_cluster_stays() -> None:
    merged, mapping = merge_near_duplicates(unit([[0, 2]]), [7], -1.0)
    np.testing.assert_allclose(merged, [[0, 1]])
    assert mapping.tolist() == [0]
