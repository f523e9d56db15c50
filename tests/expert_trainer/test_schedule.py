import heapq
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from configs.loading import load_config
from configs.schema import BaseConfig, BundleConfig, DataConfig, ExpertsConfig, RunConfig
from expert_trainer.crew import Node
from expert_trainer.errors import PoolError
from expert_trainer.schedule import (
    COHORT_SLACK,
    Waiting,
    may_wait,
    plan_cohorts,
    plan_crew,
    plan_training,
    tokens_per_step,
)

cluster_tokens = st.lists(st.integers(0, 2_000_000), max_size=200)


def make(**experts: object) -> RunConfig:
    return RunConfig(
        bundle=BundleConfig(path="runs/x"),
        base=BaseConfig(model="tiny"),
        data=DataConfig(train=["x.jsonl"]),
        experts=ExpertsConfig.model_validate(experts),
    )


def nodes(count: int, cpus: int, gpus: int = 0) -> list[Node]:
    return [Node(f"n{i}", f"host{i}", f"host{i}:1", cpus, gpus) for i in range(count)]


@given(tokens=cluster_tokens, cpus=st.integers(1, 64))
def test_every_cluster_with_text_once_and_longest_first(tokens: list[int], cpus: int) -> None:
    plan = plan_training(tokens, make(epochs=1.5), nodes(1, cpus))
    assert sorted(job.cluster for job in plan.jobs) == [i for i, n in enumerate(tokens) if n]
    steps = [job.steps for job in plan.jobs]
    assert steps == sorted(steps, reverse=True)
    assert plan.crew.actors == max(1, min(cpus, len(plan.jobs)))


@given(tokens=cluster_tokens, epochs=st.floats(0.1, 5))
def test_steps_follow_tokens(tokens: list[int], epochs: float) -> None:
    config = make(epochs=epochs)
    size = tokens_per_step(config.experts)
    for job in plan_training(tokens, config, nodes(1, 4)).jobs:
        assert job.cluster_tokens == tokens[job.cluster]
        assert (job.steps - 1) * size < max(epochs * job.cluster_tokens, 1)
        assert job.steps * size >= epochs * job.cluster_tokens - 1e-6


@given(tokens=cluster_tokens, cpus=st.integers(1, 16))
def test_loads_hold_all_work_within_grahams_bound(tokens: list[int], cpus: int) -> None:
    plan = plan_training(tokens, make(), nodes(1, cpus))
    total = sum(job.budget for job in plan.jobs)
    assert sum(plan.loads) == total
    longest = max((job.budget for job in plan.jobs), default=0)
    actors = plan.crew.actors
    assert plan.makespan <= total / actors + longest * (1 - 1 / actors) + 1


def test_tokens_per_expert_makes_equal_jobs() -> None:
    config = make(tokens_per_expert=60_000, sequence_length=256, batch_rows=8)
    plan = plan_training([10, 5_000_000, 70_000], config, nodes(1, 2))
    assert {job.steps for job in plan.jobs} == {30}
    assert [job.cluster for job in plan.jobs] == [1, 2, 0]


def test_gradient_accumulation_makes_larger_steps() -> None:
    one = plan_training([10**6], make(), nodes(1, 1)).jobs[0].steps
    four = plan_training([10**6], make(gradient_accumulation=4), nodes(1, 1)).jobs[0].steps
    assert four == -(-one // 4)


def test_presets_are_planned() -> None:
    demo = plan_training([250_000] * 8, load_config("demo"), nodes(1, 2))
    assert (len(demo.jobs), demo.crew.actors, demo.crew.share.gpus) == (8, 2, 0)
    two = plan_training([10**6] * 16, load_config("two_gpu"), nodes(1, 32, 2))
    assert (two.crew.actors, two.crew.share.gpus) == (2, 1)
    tokens = [100_000 + i for i in range(5000)]
    moin = plan_training(tokens, load_config("moin_5k"), nodes(8, 96, 8))
    assert (len(moin.jobs), moin.crew.actors) == (5000, 64)
    assert moin.makespan < 1.02 * sum(job.budget for job in moin.jobs) / 64


@pytest.mark.parametrize(
    ("experts", "count", "cpus", "gpus"),
    [
        ({"gpus_per_actor": 1}, 1, 8, 0),
        ({"cpus_per_actor": 4}, 2, 2, 0),
        ({"gpus_per_actor": 2}, 2, 8, 1),
        ({"cpus_per_actor": 9, "gpus_per_actor": 0.5}, 2, 8, 1),
        ({}, 0, 0, 0),
    ],
)
def test_an_actor_that_fits_no_node_says_so(
    experts: dict[str, object], count: int, cpus: int, gpus: int
) -> None:
    with pytest.raises(PoolError, match=r"no node has the .* cores of a training actor"):
        plan_crew(8, make(**experts).experts, nodes(count, cpus, gpus))


def test_actors_fit_within_each_node() -> None:
    assert plan_crew(99, make(gpus_per_actor=0.25).experts, nodes(1, 8, 1)).actors == 4
    assert plan_crew(99, make(gpus_per_actor=0.6).experts, nodes(2, 8, 1)).actors == 2
    assert plan_crew(99, make(cpus_per_actor=3).experts, nodes(4, 4)).actors == 4
    assert plan_crew(99, make(cpus_per_actor=3).experts, nodes(1, 16)).actors == 5


def test_an_integer_is_a_bound_that_a_smaller_cluster_need_not_reach() -> None:
    crew = plan_crew(99, make(actors=3).experts, nodes(1, 2))
    assert (crew.actors, crew.most) == (2, 3)
    crew = plan_crew(99, make(actors=3).experts, nodes(4, 2))
    assert (crew.actors, crew.most) == (3, 3)
    crew = plan_crew(1, make().experts, nodes(4, 2))
    assert (crew.actors, crew.most) == (1, None)


step_counts = st.lists(st.integers(1, 1000), max_size=120)


def makespan(lengths: Sequence[int], actors: int) -> int:
    """Longest first, each to the first actor that is free."""
    loads = [0] * actors
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(loads, loads[0] + length)
    return max(loads)


@given(steps=step_counts, actors=st.integers(1, 20), fused=st.integers(1, 16))
@example(steps=[5] * 10, actors=2, fused=4)
@example(steps=[100] * 4 + [10] * 4, actors=2, fused=4)
@example(steps=[1000] + [1] * 64, actors=64, fused=16)
def test_cohorts_leave_no_actor_idle(steps: list[int], actors: int, fused: int) -> None:
    cohorts = plan_cohorts(steps, actors=actors, fused=fused)
    assert sorted(index for cohort in cohorts for index in cohort) == list(range(len(steps)))
    assert all(1 <= len(cohort) <= fused for cohort in cohorts)
    assert len(cohorts) >= min(actors, len(steps)), "every actor gets one"
    lengths = [sum(steps[index] for index in cohort) for cohort in cohorts]
    assert lengths == sorted(lengths, reverse=True)
    apart = makespan(steps, actors)
    assert makespan(lengths, actors) <= (1 + COHORT_SLACK) * apart
    # members of a cohort are neighbours in length: no other cohort's lie between them
    ranges = sorted(
        (min(steps[i] for i in cohort), max(steps[i] for i in cohort)) for cohort in cohorts
    )
    assert all(low[1] <= high[0] for low, high in pairwise(ranges))
    assert plan_cohorts(steps, actors=actors, fused=fused) == cohorts


def test_cohorts_are_even_and_as_large_as_may_be() -> None:
    def sizes(steps: list[int], actors: int, fused: int) -> list[int]:
        return [len(cohort) for cohort in plan_cohorts(steps, actors=actors, fused=fused)]

    assert sizes([7] * 10, 2, 4) == [3, 3, 2, 2]
    assert sizes([7] * 8, 2, 4) == [4, 4]
    assert sizes([7] * 10, 1, 4) == [4, 3, 3]
    assert sizes([7] * 3, 8, 4) == [1, 1, 1]
    assert len(sizes([7] * 5000, 64, 16)) == 313, "full ones: five for an actor at the most"
    assert sizes([], 2, 4) == []


@given(steps=step_counts, actors=st.integers(1, 12))
@example(steps=[1000, 900, 5, 5, 5], actors=2)
@example(steps=[1] * 100, actors=8)
def test_a_job_on_deck_never_waits_while_an_actor_idles(steps: list[int], actors: int) -> None:
    queue = sorted(steps, reverse=True)
    running: list[tuple[int, int]] = []  # when it ends, and its actor
    deck: dict[int, int] = {}
    idle = set(range(actors))
    now = decked = 0
    while queue or running:
        while idle and queue:
            actor = idle.pop()
            heapq.heappush(running, (now + queue.pop(0), actor))
        for end, actor in running:
            if actor in deck or not queue:
                continue
            behind = Waiting(len(queue) - 1, sum(queue[1:]), queue[0], queue[-1])
            if may_wait(end - now, behind, actors):
                deck[actor] = queue.pop(0)
                decked += 1
        assert not (idle and deck), "a job waits on deck although an actor is free"
        now = running[0][0]
        while running and running[0][0] == now:
            _, actor = heapq.heappop(running)
            if actor in deck:
                heapq.heappush(running, (now + deck.pop(actor), actor))
            else:
                idle.add(actor)
    if actors == 1 and len(steps) > 1:
        assert decked == len(steps) - 1, "a lone actor always has its next job at hand"
    if len(set(steps)) == 1:
        assert decked >= len(steps) - 2 * actors, "all but the first and last jobs are at hand"
