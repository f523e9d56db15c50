"""Unit vectors to clusters: spherical and balanced k-means, on CPU or GPU, and nearest centroids.

The only module that names faiss. Knows nothing of texts, embedders or experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from configs.schema import RouterConfig
from router.balancing import balanced_assignment, capacity
from router.errors import ClusteringError
from router.merging import merge_near_duplicates

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

EXACT_SEEDING_LIMIT = 1_000_000_000
"""Points times clusters up to which k-means++ seeds; beyond, its Markov-chain approximation."""
SEED_RANGE = 2**31
"""faiss takes a seed of 31 bits."""
ROWS_AT_ONCE = 1 << 14
"""Points read from the disk at a time, where they lie there."""


@dataclass(frozen=True, slots=True)
class Clustering:
    """Clusters numbered by falling size, none of them empty."""

    centroids: Floats
    """Shape (K, D), rows of unit length."""
    assignment: Ints
    """Cluster of each point, shape (N,)."""
    objective: float
    """Mean cosine of the points and their centroids; larger is tighter."""

    @property
    def sizes(self) -> Ints:
        """Points of each cluster, shape (K,)."""
        return np.bincount(self.assignment, minlength=len(self.centroids))


class CentroidIndex:
    """Exact nearest centroids by cosine."""

    def __init__(self, centroids: Floats, *, use_gpu: bool = False) -> None:
        index: faiss.Index = faiss.IndexFlatIP(centroids.shape[1])
        if use_gpu and faiss.get_num_gpus() > 0:
            index = faiss.index_cpu_to_all_gpus(index)
        index.add(np.ascontiguousarray(centroids))
        self._index = index

    def search(self, points: Floats, count: int) -> tuple[Floats, Ints]:
        """The `count` best centroids of each point.

        Returns:
            Cosines, falling, and the centroids' rows, both of shape (N, count).
        """
        scores, found = self._index.search(np.ascontiguousarray(points), count)
        return scores, found


def nearest_centroids(
    points: Floats, centroids: Floats, *, use_gpu: bool = False
) -> tuple[Floats, Ints]:
    """The best centroid of each point, in chunks, so that points may be memory-mapped.

    Returns:
        Cosines and the centroids' rows, both of shape (N,).
    """
    index = CentroidIndex(centroids, use_gpu=use_gpu)
    scores = np.empty(len(points), dtype=np.float32)
    nearest = np.empty(len(points), dtype=np.int64)
    for part in _chunks(len(points)):
        found = index.search(points[part], 1)
        scores[part], nearest[part] = found[0][:, 0], found[1][:, 0]
    return scores, nearest


def fit_clusters(points: Floats, config: RouterConfig, *, seed: int, use_gpu: bool) -> Clustering:
    """Cluster points as a router's config says: sample, k-means, merge near-duplicates, assign all.

    With `balanced`, the bound on sizes holds before near-duplicates are merged.

    Args:
        points: shape (N, D), rows of unit length; may be memory-mapped.
        config: algorithm, number of clusters and the rest.
        seed: of the sample and of k-means.
        use_gpu: run on faiss's GPUs where it has any.

    Raises:
        ClusteringError: there are fewer distinct points than clusters.
    """
    fitted = _sample(points, config.max_fit_documents, seed)
    start = spherical_kmeans(
        fitted,
        config.clusters,
        seed=seed,
        iterations=config.iterations,
        restarts=config.restarts,
        use_gpu=use_gpu,
    )
    if config.algorithm == "spherical":
        merged, _ = merge_near_duplicates(start.centroids, start.sizes, config.merge_cosine)
        return _to_nearest(points, merged, use_gpu)
    start = _balance(fitted, start, config.balance_slack, config.iterations, use_gpu)
    assignment = start.assignment
    if len(points) > len(fitted):
        room = capacity(len(points), len(start.centroids), config.balance_slack)
        assignment = _assign_balanced(points, start.centroids, room, use_gpu)
    merged, mapping = merge_near_duplicates(start.centroids, start.sizes, config.merge_cosine)
    return numbered(points, merged, mapping[assignment])


def spherical_kmeans(
    embeddings: Floats, k: int, *, seed: int, iterations: int, restarts: int, use_gpu: bool
) -> Clustering:
    """K-means by cosine (Dhillon and Modha 2001, section 3), seeded by k-means++.

    Every point goes to its nearest centroid. Clusters that end up empty are dropped, so fewer
    than `k` may come back. The same input and seed give the same clusters.

    Args:
        embeddings: shape (N, D), rows of unit length.
        k: number of clusters.
        seed: of the restarts' starting points.
        iterations: of each restart.
        restarts: runs from other starting points; the best objective is kept.
        use_gpu: run on faiss's GPUs where it has any.

    Raises:
        ClusteringError: there are fewer distinct points than clusters.
    """
    require_distinct((row.tobytes() for row in embeddings), k)
    # k-means++ is sequential in the clusters and reads all points for each of them.
    exact = len(embeddings) * k <= EXACT_SEEDING_LIMIT
    kmeans = faiss.Kmeans(
        embeddings.shape[1],
        k,
        gpu=use_gpu and faiss.get_num_gpus() > 0,
        spherical=True,
        seed=seed % SEED_RANGE,
        niter=iterations,
        nredo=restarts,
        init_method=(
            faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
            if exact
            else faiss.ClusteringInitMethod_AFK_MC2
        ),
        # faiss would otherwise train on 256 points a cluster, and warn below 39.
        min_points_per_centroid=1,
        max_points_per_centroid=len(embeddings),
    )
    kmeans.train(np.ascontiguousarray(embeddings))
    assert kmeans.centroids is not None
    return _to_nearest(embeddings, kmeans.centroids, use_gpu)


def numbered(points: Floats, centroids: Floats, assignment: Ints) -> Clustering:
    """Drop empty clusters and number the rest by falling size, so that ids are stable for a seed.

    Args:
        points: shape (N, D), rows of unit length.
        centroids: shape (K, D), rows of unit length.
        assignment: cluster of each point, shape (N,), by the centroids' rows.
    """
    sizes = np.bincount(assignment, minlength=len(centroids))
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    number = np.full(len(centroids), -1, dtype=np.int64)
    number[order] = np.arange(len(order))
    kept, renumbered = np.ascontiguousarray(centroids[order]), number[assignment]
    return Clustering(kept, renumbered, _objective(points, kept, renumbered))


def require_distinct(items: Iterable[Hashable], clusters: int) -> None:
    """Make sure that there is at least one distinct item, a text or its vector, for each cluster.

    Raises:
        ClusteringError: there are fewer.
    """
    distinct: set[Hashable] = set()
    for item in items:
        distinct.add(item)
        if len(distinct) >= clusters:
            return
    raise ClusteringError(
        f"{clusters} clusters were asked for, but only {len(distinct)} distinct texts are there; "
        f"set router.clusters to {max(len(distinct), 1)} or less, or add documents to data.train"
    )


def limit_threads(threads: int) -> None:
    """Bound the threads of every search, for the whole process."""
    faiss.omp_set_num_threads(threads)


def _balance(
    points: Floats, start: Clustering, slack: float, iterations: int, use_gpu: bool
) -> Clustering:
    """Clusters of at most ceil(slack * N / K) points, from balanced assignment and new
    means in turn (c-BTM, arXiv 2303.14177, section 2) until nothing moves; the best round counts.
    """
    centroids, previous, best = start.centroids, None, None
    room = capacity(len(points), len(centroids), slack)
    for _ in range(iterations):
        assignment = _assign_balanced(points, centroids, room, use_gpu)
        if previous is not None and np.array_equal(assignment, previous):
            break
        centroids, previous = _means(points, assignment, centroids), assignment
        objective = _objective(points, centroids, assignment)
        if best is None or objective > best[0]:
            best = objective, centroids, assignment
    assert best is not None
    return numbered(points, best[1], best[2])


def _assign_balanced(points: Floats, centroids: Floats, room: int, use_gpu: bool) -> Ints:
    def search(waiting: Ints, clusters: Ints, count: int) -> tuple[Floats, Ints]:
        index = CentroidIndex(centroids[clusters], use_gpu=use_gpu)
        found = [index.search(points[waiting[part]], count) for part in _chunks(len(waiting))]
        scores, rows = zip(*found, strict=True)
        return np.concatenate(scores), clusters[np.concatenate(rows)]

    return balanced_assignment(len(points), len(centroids), room, search)


def _to_nearest(points: Floats, centroids: Floats, use_gpu: bool) -> Clustering:
    _, nearest = nearest_centroids(points, centroids, use_gpu=use_gpu)
    return numbered(points, centroids, nearest)


def _means(points: Floats, assignment: Ints, centroids: Floats) -> Floats:
    """Unit means of the clusters; one without points, or whose points cancel out, stays put."""
    order = np.argsort(assignment, kind="stable")
    present, starts = np.unique(assignment[order], return_index=True)
    sums = np.add.reduceat(points[order], starts, axis=0, dtype=np.float64)
    lengths = np.linalg.norm(sums, axis=1)
    usable = lengths > np.finfo(np.float32).eps
    means = centroids.copy()
    means[present[usable]] = sums[usable] / lengths[usable, None]
    return means


def _objective(points: Floats, centroids: Floats, assignment: Ints) -> float:
    total = sum(
        float(np.einsum("nd,nd->", points[part], centroids[assignment[part]]))
        for part in _chunks(len(points))
    )
    return total / len(points)


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS_AT_ONCE):
        yield slice(start, min(start + ROWS_AT_ONCE, count))


def _sample(points: Floats, most: int, seed: int) -> Floats:
    if len(points) <= most:
        return points
    chosen = np.random.default_rng(seed).choice(len(points), most, replace=False)
    return points[np.sort(chosen)]
