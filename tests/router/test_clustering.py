from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import RouterConfig
from router import clustering
from router.balancing import balanced_assignment
from router.clustering import (
    CentroidIndex,
    Clustering,
    fit_clusters,
    limit_threads,
    nearest_centroids,
    numbered,
    spherical_kmeans,
)
from router.errors import ClusteringError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

spherical = partial(spherical_kmeans, seed=0, iterations=10, restarts=2, use_gpu=False)


def balanced(points: Floats, k: int, *, slack: float, seed: int = 0) -> Clustering:
    return fit(
        points,
        seed,
        clusters=k,
        algorithm="balanced",
        balance_slack=slack,
        restarts=2,
        merge_cosine=1.0,
    )


def fit(points: Floats, seed: int = 0, **settings: object) -> Clustering:
    config = RouterConfig.model_validate({"iterations": 10, "device": "cpu", **settings})
    return fit_clusters(points, config, seed=seed, use_gpu=False)


def blobs(
    count: int, directions: int, dimension: int = 8, seed: int = 0, noise: float = 0.1
) -> Floats:
    """Unit vectors around a few directions, unevenly many of each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((directions, dimension))
    shares = 1 / np.arange(1, directions + 1)
    chosen = rng.choice(directions, size=count, p=shares / shares.sum())
    vectors = centres[chosen] + noise * rng.standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def check(clustering: Clustering, points: Floats) -> None:
    """What holds for every clustering."""
    sizes = clustering.sizes
    assert clustering.centroids.dtype == np.float32
    assert clustering.assignment.shape == (len(points),)
    assert len(sizes) == len(clustering.centroids)
    assert sizes.min() >= 1
    assert np.all(np.diff(sizes) <= 0)
    np.testing.assert_allclose(np.linalg.norm(clustering.centroids, axis=1), 1, atol=1e-5)
    cosines = np.sum(points * clustering.centroids[clustering.assignment], axis=1)
    assert clustering.objective == pytest.approx(cosines.mean(), abs=1e-5)


shapes = st.tuples(st.integers(1, 12), st.integers(0, 200), st.integers(0, 999))


@given(shapes)
@settings(max_examples=30)
def test_spherical_clusters_hold_what_is_nearest(shape: tuple[int, int, int]) -> None:
    clusters, more, seed = shape
    points = blobs(clusters + more, 4, seed=seed, noise=0.5)
    clustering = spherical(points, clusters, seed=seed)
    check(clustering, points)
    scores = points @ clustering.centroids.T
    own = scores[np.arange(len(points)), clustering.assignment]
    np.testing.assert_allclose(own, scores.max(axis=1), atol=1e-5)


@given(shapes, st.floats(1, 2))
@settings(max_examples=30)
def test_balanced_clusters_keep_their_bound(shape: tuple[int, int, int], slack: float) -> None:
    clusters, more, seed = shape
    points = blobs(clusters + more, 4, seed=seed, noise=0.5)
    clustering = balanced(points, clusters, slack=slack, seed=seed)
    check(clustering, points)
    bound = math.ceil(slack * len(points) / len(clustering.centroids))
    assert clustering.sizes.max() <= bound


def test_clear_clusters_are_found() -> None:
    labels = np.repeat(np.arange(5), [90, 70, 60, 50, 30])
    noise = 0.05 * np.random.default_rng(0).standard_normal((300, 8))
    points = (np.eye(8)[labels] + noise).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    np.testing.assert_array_equal(spherical(points, 5, restarts=5).assignment, labels)


def test_balancing_costs_tightness_only() -> None:
    points = blobs(400, 5, noise=0.3)
    free, bound = spherical(points, 5), balanced(points, 5, slack=1.0)
    assert free.sizes.max() > 80
    assert bound.sizes.tolist() == [80] * 5
    assert bound.objective < free.objective


def test_balancing_goes_beyond_one_balanced_assignment() -> None:
    points = blobs(400, 5, noise=0.6)
    start = spherical(points, 8)

    def search(waiting: Ints, clusters: Ints, count: int) -> tuple[Floats, Ints]:
        scores, found = CentroidIndex(start.centroids[clusters]).search(points[waiting], count)
        return scores, clusters[found]

    once = balanced_assignment(400, 8, 50, search)
    sums = np.stack([points[once == cluster].sum(axis=0) for cluster in range(8)])
    tightness = np.linalg.norm(sums, axis=1).sum() / 400
    assert balanced(points, 8, slack=1.0).objective > tightness + 0.005


@pytest.mark.parametrize("cluster", [spherical, partial(balanced, slack=1.2)])
def test_a_seed_decides_everything(cluster: partial[Clustering]) -> None:
    points = blobs(300, 12, noise=0.6)
    one, same, other = (cluster(points, 12, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.centroids, same.centroids)
    np.testing.assert_array_equal(one.assignment, same.assignment)
    assert not np.array_equal(one.centroids, other.centroids)


def test_the_number_of_threads_changes_nothing() -> None:
    points = blobs(3000, 20, dimension=64, noise=0.6)
    before = faiss.omp_get_max_threads()
    try:
        limit_threads(1)
        one = spherical(points, 20)
        limit_threads(2)
        two = spherical(points, 20)
    finally:
        limit_threads(before)
    np.testing.assert_array_equal(one.centroids, two.centroids)


DIGEST = """
import hashlib, numpy as np
from configs.schema import RouterConfig
from router.clustering import fit_clusters
rng = np.random.default_rng(0)
points = rng.standard_normal((400, 16)).astype(np.float32)
points /= np.linalg.norm(points, axis=1, keepdims=True)
config = RouterConfig(clusters=9, algorithm="balanced", iterations=8, restarts=2)
found = fit_clusters(points, config, seed=1, use_gpu=False)
print(hashlib.sha256(found.centroids.tobytes() + found.assignment.tobytes()).hexdigest())
"""


def test_two_processes_find_the_same_clusters() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64


@pytest.mark.parametrize("cluster", [spherical, partial(balanced, slack=1.5)])
def test_duplicates_do_not_make_a_cluster(cluster: partial[Clustering]) -> None:
    distinct = np.eye(3, dtype=np.float32)
    points = np.repeat(distinct, [20, 5, 5], axis=0)
    check(cluster(points, 3), points)
    with pytest.raises(
        ClusteringError, match=r"4 clusters.*only 3 distinct.*router\.clusters to 3"
    ):
        cluster(points, 4)


def test_as_many_clusters_as_points() -> None:
    points = np.eye(4, dtype=np.float32)
    clustering = spherical(points, 4)
    assert sorted(clustering.assignment.tolist()) == [0, 1, 2, 3]
    assert clustering.objective == pytest.approx(1)


def test_empty_clusters_are_dropped_and_the_rest_numbered_by_size() -> None:
    centroids = np.eye(5, dtype=np.float32)
    old = np.array([4, 1, 4, 4, 1, 2])
    clustering = numbered(centroids[old], centroids, old)
    check(clustering, centroids[old])
    assert clustering.assignment.tolist() == [0, 1, 0, 0, 1, 2]
    np.testing.assert_array_equal(clustering.centroids, centroids[[4, 1, 2]])


def test_no_points_at_all_say_so() -> None:
    with pytest.raises(ClusteringError, match="only 0 distinct"):
        spherical(np.empty((0, 4), dtype=np.float32), 1)


def test_a_large_seed_is_taken() -> None:
    check(spherical(blobs(50, 3), 3, seed=2**40 + 1), blobs(50, 3))


def test_the_index_finds_the_best_centroids_in_order() -> None:
    points, centroids = blobs(40, 3, noise=1), blobs(30, 9, seed=1, noise=1)
    scores, found = CentroidIndex(centroids).search(points, 5)
    exact = points @ centroids.T
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, found, axis=1), scores, atol=1e-6)


def test_points_on_disk_are_assigned_like_points_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = blobs(700, 6, noise=0.6)
    centroids = blobs(20, 9, seed=1, noise=1)
    whole = nearest_centroids(points, centroids)
    expected = CentroidIndex(centroids).search(points, 1)
    points.tofile(tmp_path / "points")
    on_disk = np.memmap(tmp_path / "points", np.float32, "r", shape=points.shape)
    apart = {name: fit(points, clusters=5, algorithm=name) for name in ("spherical", "balanced")}
    monkeypatch.setattr(clustering, "ROWS_AT_ONCE", 64)
    for found in (whole, nearest_centroids(on_disk, centroids)):
        np.testing.assert_array_equal(found[0], expected[0][:, 0])
        np.testing.assert_array_equal(found[1], expected[1][:, 0])
    for name, clusters in apart.items():
        same = fit(on_disk, clusters=5, algorithm=name)
        np.testing.assert_array_equal(same.assignment, clusters.assignment)


@pytest.mark.parametrize("algorithm", ["spherical", "balanced"])
def test_near_duplicates_are_merged(algorithm: str) -> None:
    points = blobs(300, 3, noise=0.03)
    apart = fit(points, clusters=9, algorithm=algorithm, merge_cosine=1.0)
    merged = fit(points, clusters=9, algorithm=algorithm, merge_cosine=0.95)
    assert len(apart.centroids) == 9
    assert len(merged.centroids) == 3
    check(merged, points)
    assert merged.objective > 0.98


@pytest.mark.parametrize("algorithm", ["spherical", "balanced"])
def test_a_sample_is_fitted_and_everything_assigned(algorithm: str) -> None:
    points = blobs(900, 4, noise=0.2)
    settings = {"clusters": 4, "algorithm": algorithm, "merge_cosine": 1.0, "balance_slack": 1.2}
    part = fit(points, max_fit_documents=150, **settings)
    check(part, points)
    if algorithm == "balanced":
        assert part.sizes.max() <= math.ceil(1.2 * 900 / 4)
    assert part.objective == pytest.approx(fit(points, **settings).objective, abs=0.03)
