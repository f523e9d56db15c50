from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ServingConfigError
from server.placement import ExpertDemand, Placement, WorkerCapacity, plan_placement, replan

masses = st.floats(0, 1, allow_nan=False)
demands = st.lists(masses, max_size=40).map(
    lambda values: [ExpertDemand(f"expert-{i:04d}", mass, 8) for i, mass in enumerate(values)]
)
capacities = st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=6).map(
    lambda slots: [WorkerCapacity(f"worker-{i}", count) for i, count in enumerate(slots)]
)


def mass_on(placement: Placement, experts: list[ExpertDemand], worker: str) -> float:
    by_id = {expert.id: expert.mass for expert in experts}
    return sum(by_id[expert] for expert in placement.experts_of(worker))


@given(demands, capacities)
def test_every_expert_has_one_home_that_exists(
    experts: list[ExpertDemand], workers: list[WorkerCapacity]
) -> None:
    placement = plan_placement(experts, workers)
    known = {worker.id for worker in workers}
    assert set(placement.homes) == {expert.id for expert in experts}
    assert all(len(homes) == 1 and homes[0] in known for homes in placement.homes.values())
    listed = [expert for worker in workers for expert in placement.experts_of(worker.id)]
    assert sorted(listed) == sorted(placement.homes)


@given(demands, capacities, st.randoms(use_true_random=False))
def test_the_order_of_what_is_passed_does_not_matter(
    experts: list[ExpertDemand], workers: list[WorkerCapacity], shuffler: random.Random
) -> None:
    expected = plan_placement(experts, workers)
    shuffler.shuffle(experts)
    shuffler.shuffle(workers)
    assert plan_placement(experts, workers) == expected


@given(demands, capacities)
def test_slots_are_exceeded_only_when_all_are_taken(
    experts: list[ExpertDemand], workers: list[WorkerCapacity]
) -> None:
    placement = plan_placement(experts, workers)
    free = [w for w in workers if w.slots is None or len(placement.experts_of(w.id)) < w.slots]
    over = [w for w in workers if w.slots is not None and len(placement.experts_of(w.id)) > w.slots]
    assert not (free and over)


@given(demands, st.integers(1, 6))
def test_no_two_workers_differ_by_more_than_the_heaviest_expert(
    experts: list[ExpertDemand], count: int
) -> None:
    workers = [WorkerCapacity(f"worker-{i}", None) for i in range(count)]
    placement = plan_placement(experts, workers)
    loads = [mass_on(placement, experts, worker.id) for worker in workers]
    heaviest = max((expert.mass for expert in experts), default=0.0)
    assert max(loads) - min(loads) <= heaviest + 1e-9


@given(demands, st.integers(2, 6))
def test_losing_a_worker_moves_only_its_own_experts(
    experts: list[ExpertDemand], count: int
) -> None:
    workers = [WorkerCapacity(f"worker-{i}", None) for i in range(count)]
    before = plan_placement(experts, workers)
    after = replan(before, experts, workers[1:])
    moved = {expert for expert in before.homes if before.homes[expert] != after.homes[expert]}
    assert moved == set(before.experts_of("worker-0"))


@given(demands, capacities)
def test_planning_again_with_nothing_new_moves_nothing(
    experts: list[ExpertDemand], workers: list[WorkerCapacity]
) -> None:
    placement = plan_placement(experts, workers)
    slots = sum(worker.slots or len(experts) for worker in workers)
    if len(experts) <= slots:
        assert replan(placement, experts, workers) == placement


def test_heavy_experts_are_kept_apart() -> None:
    experts = [
        ExpertDemand("expert-0000", 0.4, 8),
        ExpertDemand("expert-0001", 0.35, 8),
        ExpertDemand("expert-0002", 0.15, 8),
        ExpertDemand("expert-0003", 0.1, 8),
    ]
    placement = plan_placement(experts, [WorkerCapacity("a", None), WorkerCapacity("b", None)])
    assert placement.experts_of("a") == ("expert-0000", "expert-0003")
    assert placement.experts_of("b") == ("expert-0001", "expert-0002")


def test_five_thousand_experts_on_64_workers_are_balanced_to_a_hundredth() -> None:
    rng = random.Random(0)
    weights = [rng.paretovariate(1.5) for _ in range(5000)]
    experts = [
        ExpertDemand(f"expert-{i:04d}", weight / sum(weights), 8)
        for i, weight in enumerate(weights)
    ]
    workers = [WorkerCapacity(f"worker-{i}", None) for i in range(64)]
    placement = plan_placement(experts, workers)
    loads = [mass_on(placement, experts, worker.id) for worker in workers]
    heaviest = max(expert.mass for expert in experts)
    assert max(loads) <= max(1.01 / 64, heaviest)


def test_no_worker_and_twins_are_refused() -> None:
    twin = ExpertDemand("expert-0000", 0.5, 8)
    with pytest.raises(ServingConfigError, match="no worker"):
        plan_placement([twin], [])
    with pytest.raises(ServingConfigError, match="expert-0000 appears twice"):
        plan_placement([twin, twin], [WorkerCapacity("worker-0", None)])
