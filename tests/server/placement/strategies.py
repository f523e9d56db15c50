"""Experts and workers of all sorts, and what is measured on a placement of them."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from server.placement import ExpertDemand, Placement, Policy, WorkerCapacity


def experts_of(masses: Sequence[float], rank: int = 8, size: int = 0) -> list[ExpertDemand]:
    return [ExpertDemand(f"expert-{i:04d}", mass, rank, size) for i, mass in enumerate(masses)]


def workers_of(
    count: int, slots: int | None = None, memory: int | None = None
) -> list[WorkerCapacity]:
    return [WorkerCapacity(f"worker-{i}", slots, memory) for i in range(count)]


masses = st.floats(0, 1, allow_nan=False)
demands = st.lists(
    st.tuples(masses, st.sampled_from((8, 8, 8, 16, 64)), st.integers(0, 9)), max_size=40
).map(
    lambda rows: [
        ExpertDemand(f"expert-{i:04d}", mass, rank, size)
        for i, (mass, rank, size) in enumerate(rows)
    ]
)
capacities = st.lists(
    st.tuples(
        st.none() | st.integers(1, 12), st.none() | st.integers(0, 60), st.sampled_from((1.0, 2.0))
    ),
    min_size=1,
    max_size=6,
).map(
    lambda rows: [
        WorkerCapacity(f"worker-{i}", slots, memory, weight)
        for i, (slots, memory, weight) in enumerate(rows)
    ]
)
policies = st.builds(Policy, max_replicas=st.integers(1, 4), gain=st.sampled_from((0.05, 0.1, 0.3)))
even_masses = st.lists(st.floats(0.5, 1), min_size=60, max_size=120)
"""Many experts, none of which is most of a worker: what can be balanced."""


def loads(
    placement: Placement, experts: Sequence[ExpertDemand], workers: Sequence[WorkerCapacity]
) -> list[float]:
    """Mass on every worker, each expert's spread evenly over its homes."""
    share = {e.id: e.mass / len(placement.homes[e.id]) for e in experts}
    return [sum(share[expert] for expert in placement.experts_of(w.id)) for w in workers]


def gained(before: Placement, after: Placement) -> dict[str, set[str]]:
    """Workers that experts live on now and did not before, by expert."""
    found = {e: set(homes) - set(before.homes.get(e, ())) for e, homes in after.homes.items()}
    return {expert: workers for expert, workers in found.items() if workers}
