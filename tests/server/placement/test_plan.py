from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ServingConfigError
from server.placement import (
    ExpertDemand,
    Placement,
    Policy,
    WorkerCapacity,
    moved,
    plan_placement,
    replan,
)
from tests.server.placement.strategies import (
    capacities,
    demands,
    even_masses,
    experts_of,
    gained,
    loads,
    policies,
    workers_of,
)

BUSY = Policy(max_replicas=4)


@given(demands, capacities, policies)
def test_every_expert_has_homes_that_exist_and_not_too_many(
    experts: list[ExpertDemand], workers: list[WorkerCapacity], policy: Policy
) -> None:
    placement = plan_placement(experts, workers, policy)
    known = {worker.id for worker in workers}
    assert set(placement.homes) == {expert.id for expert in experts}
    for homes in placement.homes.values():
        assert 1 <= len(homes) <= policy.max_replicas
        assert len(set(homes)) == len(homes)
        assert set(homes) <= known
    listed = [(e, worker.id) for worker in workers for e in placement.experts_of(worker.id)]
    assert sorted(listed) == sorted((e, w) for e, homes in placement.homes.items() for w in homes)


@given(demands, capacities, policies, st.randoms(use_true_random=False))
def test_the_order_of_what_is_passed_does_not_matter(
    experts: list[ExpertDemand],
    workers: list[WorkerCapacity],
    policy: Policy,
    shuffler: random.Random,
) -> None:
    expected = plan_placement(experts, workers, policy)
    again = replan(expected, experts, workers[:1], policy)
    shuffler.shuffle(experts)
    first = workers[:1]
    shuffler.shuffle(workers)
    assert plan_placement(experts, workers, policy) == expected
    assert replan(expected, experts, first, policy) == again


@given(demands, capacities, policies)
def test_planning_again_with_nothing_new_moves_nothing(
    experts: list[ExpertDemand], workers: list[WorkerCapacity], policy: Policy
) -> None:
    placement = plan_placement(experts, workers, policy)
    assert replan(placement, experts, workers, policy) == placement


@given(
    st.lists(st.floats(0, 1), max_size=40),
    st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=6),
    policies,
)
def test_slots_are_exceeded_only_when_all_are_taken(
    masses: list[float], slots: list[int | None], policy: Policy
) -> None:
    experts = experts_of(masses)
    workers = [WorkerCapacity(f"worker-{i}", count) for i, count in enumerate(slots)]
    placement = plan_placement(experts, workers, policy)
    held = {w.id: len(placement.experts_of(w.id)) for w in workers}
    free = [w for w in workers if w.slots is None or held[w.id] < w.slots]
    over = [w for w in workers if w.slots is not None and held[w.id] > w.slots]
    assert not (free and over)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9)), min_size=1, max_size=40),
    st.integers(1, 6),
    policies,
)
def test_memory_is_respected_where_it_can_be(
    rows: list[tuple[float, int]], count: int, policy: Policy
) -> None:
    experts = [ExpertDemand(f"expert-{i:04d}", m, 8, size) for i, (m, size) in enumerate(rows)]
    # with the largest adapter's room to spare on each worker there is always one with room
    budget = -(-sum(e.bytes for e in experts) // count) + max(e.bytes for e in experts)
    workers = workers_of(count, memory=budget)
    placement = plan_placement(experts, workers, policy)
    size = {e.id: e.bytes for e in experts}
    assert all(sum(size[e] for e in placement.experts_of(w.id)) <= budget for w in workers)


@given(even_masses, st.integers(1, 6), policies)
def test_no_worker_is_busier_than_its_fair_load_and_one_expert(
    masses: list[float], count: int, policy: Policy
) -> None:
    experts, workers = experts_of(masses), workers_of(count)
    found = loads(plan_placement(experts, workers, policy), experts, workers)
    assert max(found) <= 1.05 * sum(masses) / count + max(masses)


@given(demands, st.integers(2, 6), policies, st.integers(0, 5))
def test_losing_a_worker_moves_only_its_own_experts(
    experts: list[ExpertDemand], count: int, policy: Policy, lost: int
) -> None:
    workers = workers_of(count)
    gone = workers.pop(lost % count).id
    before = plan_placement(experts, [*workers, WorkerCapacity(gone, None)], policy)
    after = replan(before, experts, workers, policy)
    assert set(gained(before, after)) <= set(before.experts_of(gone))
    for expert, homes in before.homes.items():
        if gone not in homes:
            assert after.homes[expert] == homes


@given(even_masses, st.integers(2, 8))
def test_a_worker_more_takes_about_its_fair_share_and_moves_nobody_else(
    masses: list[float], count: int
) -> None:
    experts, workers = experts_of(masses), workers_of(count + 1)
    before = plan_placement(experts, workers[:-1])
    after = replan(before, experts, workers)
    found = gained(before, after)
    assert all(homes == {workers[-1].id} for homes in found.values())
    load = sum(e.mass for e in experts if e.id in found)
    assert load <= 1.1 * sum(masses) / (count + 1) + max(masses)


def test_a_worker_that_comes_back_gets_its_experts_back() -> None:
    rng = random.Random(0)
    experts = experts_of([rng.uniform(0.5, 1) for _ in range(400)])
    workers = workers_of(8)
    before = plan_placement(experts, workers)
    back = replan(replan(before, experts, workers[1:]), experts, workers)
    mine, again = set(before.experts_of("worker-0")), set(back.experts_of("worker-0"))
    assert len(mine & again) >= 0.7 * len(mine)


@given(even_masses, st.integers(2, 6), st.randoms(use_true_random=False))
def test_noise_under_the_damping_moves_nothing(
    masses: list[float], count: int, noise: random.Random
) -> None:
    policy = Policy(max_replicas=4, gain=0.15)
    experts, workers = experts_of(masses), workers_of(count)
    before = plan_placement(experts, workers, policy)
    shaken = experts_of([mass * noise.uniform(0.98, 1.02) for mass in masses])
    assert replan(before, shaken, workers, policy) == before


def test_demand_that_changed_is_balanced_again_with_few_moves() -> None:
    rng = random.Random(0)
    experts, workers = experts_of([rng.uniform(0.5, 1) for _ in range(400)]), workers_of(8)
    before = plan_placement(experts, workers)
    hot = set(before.experts_of("worker-3"))
    shifted = [ExpertDemand(e.id, e.mass * (2 if e.id in hot else 1), 8) for e in experts]
    after = replan(before, shifted, workers)
    found = loads(after, shifted, workers)
    assert max(found) <= 1.06 * sum(found) / 8
    assert 0 < moved(before, after) <= 40
    assert replan(after, shifted, workers) == after


def test_busy_experts_get_more_homes_and_quiet_ones_one() -> None:
    experts = experts_of([0.5, 0.1, *[0.4 / 98] * 98])
    placement = plan_placement(experts, workers_of(8), Policy(max_replicas=4))
    assert [len(placement.homes[e.id]) for e in experts[:2]] == [4, 2]
    assert {len(placement.homes[e.id]) for e in experts[2:]} == {1}


def test_homes_more_never_cost_another_expert_its_slot() -> None:
    experts = experts_of([0.9, *[0.1 / 14] * 14])
    placement = plan_placement(experts, workers_of(4, slots=4), BUSY)
    assert len(placement.homes["expert-0000"]) == 2
    assert all(len(placement.experts_of(f"worker-{i}")) <= 4 for i in range(4))
    more = experts_of([0.9, *[0.1 / 15] * 15])
    assert len(replan(placement, more, workers_of(4, slots=4), BUSY).homes["expert-0000"]) == 1


def test_new_experts_are_placed_and_old_ones_forgotten() -> None:
    workers = workers_of(3)
    before = plan_placement(experts_of([0.2] * 10), workers)
    after = replan(before, experts_of([0.2] * 12)[1:], workers)
    assert set(after.homes) == {f"expert-{i:04d}" for i in range(1, 12)}
    assert set(gained(before, after)) == {"expert-0010", "expert-0011"}


def test_a_faster_worker_takes_more() -> None:
    experts = experts_of([1.0] * 300)
    workers = [WorkerCapacity("slow", None), WorkerCapacity("fast", None, weight=2.0)]
    slow, fast = loads(plan_placement(experts, workers), experts, workers)
    assert fast == pytest.approx(2 * slow, rel=0.1)


def test_high_ranks_are_kept_together() -> None:
    experts = [ExpertDemand(f"expert-{i:04d}", 1.0, 64 if i % 4 == 0 else 8) for i in range(400)]
    workers = workers_of(8)
    placement = plan_placement(experts, workers)
    rank = {e.id: e.rank for e in experts}
    slow = [w for w in workers if any(rank[e] == 64 for e in placement.experts_of(w.id))]
    assert len(slow) <= 4


def test_high_ranks_go_to_engines_that_are_sized_for_them() -> None:
    experts = [ExpertDemand(f"expert-{i:04d}", 1.0, 64 if i < 10 else 8) for i in range(20)]
    workers = [WorkerCapacity("small", None, rank=8), WorkerCapacity("large", None, rank=64)]
    placement = plan_placement(experts, workers)
    rank = {e.id: e.rank for e in experts}
    assert sum(rank[e] == 64 for e in placement.experts_of("large")) == 10
    assert all(len(homes) == 1 for homes in placement.homes.values())
    too_high = [ExpertDemand("expert-0000", 1.0, 128)]
    assert plan_placement(too_high, workers).homes["expert-0000"]


def test_heavy_experts_are_kept_apart() -> None:
    experts = experts_of([0.4, 0.35, 0.15, 0.1])
    workers = workers_of(2)
    placement = plan_placement(experts, workers)
    assert sorted(loads(placement, experts, workers)) == pytest.approx([0.5, 0.5])
    assert placement.homes["expert-0000"] != placement.homes["expert-0001"]


@pytest.mark.parametrize("slots", [None, 32, 100])
def test_five_thousand_experts_on_64_workers_are_balanced(slots: int | None) -> None:
    rng = random.Random(0)
    weights = [rng.paretovariate(1.5) for _ in range(5000)]
    experts = experts_of([weight / sum(weights) for weight in weights])
    workers = workers_of(64, slots)
    placement = plan_placement(experts, workers, BUSY)
    assert max(loads(placement, experts, workers)) <= 1.15 / 64
    assert replan(placement, experts, workers, BUSY) == placement


def test_experts_without_a_slot_are_kept_together_but_nowhere_crowded() -> None:
    experts = experts_of([1 / (1 + i) for i in range(1000)])
    placement = plan_placement(experts, workers_of(16, slots=32))
    counts = sorted(len(placement.experts_of(f"worker-{i}")) for i in range(16))
    assert counts[4] == 32
    assert counts[-1] <= 2.2 * 1000 / 16


def test_no_worker_and_twins_are_refused() -> None:
    twin = ExpertDemand("expert-0000", 0.5, 8)
    with pytest.raises(ServingConfigError, match="no worker"):
        plan_placement([twin], [])
    with pytest.raises(ServingConfigError, match="expert-0000 appears twice"):
        plan_placement([twin, twin], [WorkerCapacity("worker-0", None)])
    with pytest.raises(ServingConfigError, match="worker-0 appears twice"):
        replan(Placement({}), [twin], [WorkerCapacity("worker-0", None)] * 2)


def test_moved_counts_adapters_to_load() -> None:
    before = Placement({"a": ("w0",), "b": ("w0", "w1")})
    after = Placement({"a": ("w1",), "b": ("w1",), "c": ("w0", "w1")})
    assert moved(before, after) == 3
