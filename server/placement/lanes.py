"""Ranks apart: which workers experts of each rank should live on.

An engine computes at the highest rank it was given for all its experts, so ranks that are mixed
everywhere make every engine as slow as the highest. Kept apart, the high ranks make only as many
engines slow as their load needs (as LoRAServe, arXiv 2511.22880, does for loads over time).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from server.placement.types import ExpertDemand, WorkerCapacity

LEAST_OVERLAP = 0.1
"""Share of a worker that a rank must need to be let onto it."""


def lanes_of(
    experts: Sequence[ExpertDemand],
    loads: Sequence[float],
    workers: Sequence[WorkerCapacity],
    cost: Callable[[int], float],
) -> dict[int, frozenset[int]]:
    """Numbers of the workers for every rank; a rank that is missing may live anywhere.

    Ranks and workers, both from the highest rank down, are laid side by side along one line, each
    as long as its share of load and of weight: a rank may live where the two touch.
    """
    by_rank: defaultdict[int, float] = defaultdict(float)
    for expert, load in zip(experts, loads, strict=True):
        by_rank[expert.rank] += load * cost(expert.rank)
    if len(by_rank) <= 1 or len(workers) == 1:
        return {}
    order = sorted(range(len(workers)), key=lambda w: (-(workers[w].rank or 0), w))
    weights = [workers[w].weight / sum(worker.weight for worker in workers) for w in order]
    lanes: dict[int, frozenset[int]] = {}
    begin, total = 0.0, sum(by_rank.values())
    for rank in sorted(by_rank, reverse=True):
        end = begin + by_rank[rank] / total
        lanes[rank] = _touching(begin, end, order, weights)
        begin = end
    return lanes


def _touching(
    begin: float, end: float, order: Sequence[int], weights: Sequence[float]
) -> frozenset[int]:
    """Workers whose part of the line overlaps [begin, end); at least the one that does so most."""
    overlaps: list[tuple[float, int, float]] = []
    at = 0.0
    for worker, weight in zip(order, weights, strict=True):
        overlaps.append((min(end, at + weight) - max(begin, at), -worker, weight))
        at += weight
    found = {-worker for overlap, worker, weight in overlaps if overlap > LEAST_OVERLAP * weight}
    return frozenset(found or {-max(overlaps)[1]})
