"""What is to be trained, in which order, together with what, on how many actors.

Pure: numbers in, a plan out. Knows nothing of Ray, devices or data.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from configs.schema import ExpertsConfig, RunConfig
from expert_trainer.crew import Node, Share
from expert_trainer.errors import PoolError

COHORT_SLACK = 0.05
"""Share by which larger cohorts may lengthen a run's estimate; training together gains more."""


@dataclass(frozen=True)
class PlannedJob:
    """One expert to train."""

    cluster: int
    cluster_tokens: int
    steps: int
    """Optimiser steps."""
    budget: int
    """Tokens those steps have room for."""


@dataclass(frozen=True)
class Crew:
    """The actors that share a run's jobs."""

    actors: int
    """As many as the nodes have room for now, and never more than jobs."""
    most: int | None
    """Bound on the actors as nodes join; none: as many as they have room for."""
    share: Share
    """What each holds."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Jobs in a queue."""

    jobs: int
    steps: int
    """Of all of them together."""
    longest: int
    """Steps of the longest, at the most."""
    shortest: int
    """Steps of the shortest, at the least."""


@dataclass(frozen=True)
class TrainingPlan:
    """All experts of a run and the actors that share them."""

    jobs: tuple[PlannedJob, ...]
    """Longest first, so that no actor is left with a long one at the end."""
    crew: Crew
    loads: tuple[int, ...]
    """Estimated tokens of each actor, if all are equally fast."""

    @property
    def makespan(self) -> int:
        """Estimated tokens of the busiest actor: how long the run takes."""
        return max(self.loads, default=0)


def plan_training(
    cluster_tokens: Sequence[int], config: RunConfig, nodes: Sequence[Node]
) -> TrainingPlan:
    """Plan the training of one expert per cluster that has any text.

    Longest first onto the first free actor is Graham's LPT rule (SIAM J. Appl. Math. 17(2), 1969,
    section 5): at most 4/3 of the best makespan.

    Args:
        cluster_tokens: training tokens of each cluster.
        config: the run.
        nodes: those of the Ray cluster.

    Raises:
        PoolError: no node has what an actor is to hold.
    """
    jobs = plan_jobs(cluster_tokens, config.experts)
    crew = plan_crew(len(jobs), config.experts, nodes)
    return TrainingPlan(jobs, crew, _loads([job.budget for job in jobs], crew.actors))


def plan_jobs(cluster_tokens: Sequence[int], experts: ExpertsConfig) -> tuple[PlannedJob, ...]:
    """One job per cluster that has any text, longest first."""
    jobs = [
        _plan_job(cluster, tokens, experts)
        for cluster, tokens in enumerate(cluster_tokens)
        if tokens > 0
    ]
    return tuple(sorted(jobs, key=lambda job: (-job.steps, -job.cluster_tokens, job.cluster)))


def plan_crew(jobs: int, experts: ExpertsConfig, nodes: Sequence[Node]) -> Crew:
    """How many actors, never more than jobs, and what each holds.

    An integer `experts.actors` is what the run takes at the most: after the loss of a node the
    same command goes on with fewer.

    Raises:
        PoolError: no node has what an actor is to hold.
    """
    share = Share(experts.cpus_per_actor, _gpus_per_actor(experts, nodes))
    room = sum(share.room(node) for node in nodes)
    if room == 0:
        has = "; ".join(f"{node.address}: {node.gpus} GPUs, {node.cpus} cores" for node in nodes)
        raise PoolError(
            f"no node has the {share.gpus:g} GPUs and {share.cpus} cores of a training actor "
            f"({has or 'there is none'}); lower experts.gpus_per_actor or experts.cpus_per_actor, "
            "or add nodes"
        )
    most = None if experts.actors == "auto" else experts.actors
    return Crew(min(room, most or room, max(jobs, 1)), most, share)


def plan_cohorts(steps: Sequence[int], *, actors: int, fused: int) -> tuple[tuple[int, ...], ...]:
    """Group jobs into cohorts that are trained together.

    Members of a cohort have similar step counts, so that they end together. A cohort takes as
    long as its steps together; of all ways tried, from few large cohorts to every job alone, the
    one with the fewest cohorts is taken whose run, longest cohort first onto the first free
    actor, ends no later than `COHORT_SLACK` after the earliest. So the run's estimate is at most
    (1 + COHORT_SLACK) times that of the same jobs apart.

    Args:
        steps: optimiser steps of each job, at least one.
        actors: the actors that share the cohorts.
        fused: members of a cohort at the most.

    Returns:
        Indices into `steps`, longest cohort first; in each the longest member first.
    """
    order = sorted(range(len(steps)), key=lambda index: (-steps[index], index))
    sizes = _cohort_sizes([steps[index] for index in order], actors, fused)
    members = iter(order)
    cohorts = [tuple(next(members) for _ in range(size)) for size in sizes]
    return tuple(sorted(cohorts, key=lambda cohort: -sum(steps[index] for index in cohort)))


def may_wait(steps_left: int, behind: Waiting, actors: int) -> bool:
    """Whether a job may be put on deck behind the one that an actor is running.

    Only while that costs nothing: the other actors have so much before them that none of them
    idles before this one takes the job up. Each takes jobs until the queue is empty; so with n
    others the first of them idles neither before steps / n - longest have been taken, as they
    share the work evenly up to one job, nor before (jobs // n) x shortest.

    Args:
        steps_left: of the job that the actor is running.
        behind: what would stay in the queue.
        actors: all of them, this one included.
    """
    others = actors - 1
    return (
        others * (steps_left + behind.longest) <= behind.steps
        or others == 0
        or steps_left <= behind.jobs // others * behind.shortest
    )


def steps_for(tokens: float, experts: ExpertsConfig) -> int:
    """Optimiser steps, at least one, that see `tokens` tokens in full rows."""
    return max(1, math.ceil(tokens / tokens_per_step(experts)))


def tokens_per_step(experts: ExpertsConfig) -> int:
    """Tokens that one optimiser step has room for."""
    return experts.sequence_length * experts.batch_rows * experts.gradient_accumulation


def _plan_job(cluster: int, tokens: int, experts: ExpertsConfig) -> PlannedJob:
    wanted = experts.tokens_per_expert or (experts.epochs or 1.0) * tokens
    steps = steps_for(wanted, experts)
    return PlannedJob(cluster, tokens, steps, steps * tokens_per_step(experts))


def _gpus_per_actor(experts: ExpertsConfig, nodes: Sequence[Node]) -> float:
    if experts.gpus_per_actor == "auto":
        return 1.0 if any(node.gpus for node in nodes) else 0.0
    return float(experts.gpus_per_actor)


def _cohort_sizes(lengths: Sequence[int], actors: int, fused: int) -> list[int]:
    """Sizes of the cohorts of jobs, longest first, that are neighbours in length."""
    least = max(sum(lengths) / actors, max(lengths, default=0))
    tried: list[tuple[int, list[int]]] = []
    for count in _cohort_counts(len(lengths), actors, fused):
        sizes = _cut(lengths, count, fused)
        sums = sorted(_sums(lengths, sizes), reverse=True)
        tried.append((max(_loads(sums, actors)), sizes))
        if tried[-1][0] <= (1 + COHORT_SLACK) * least:  # more cohorts cannot gain that much
            return sizes
    limit = (1 + COHORT_SLACK) * min((makespan for makespan, _ in tried), default=0)
    return next((sizes for makespan, sizes in tried if makespan <= limit), [])


def _cohort_counts(jobs: int, actors: int, fused: int) -> Iterator[int]:
    """Numbers of cohorts that are worth a try, from one for each actor to as many as jobs.

    All multiples of the actors among the first, and then ever larger steps.
    """
    fewest = count = max(-(-jobs // fused), min(jobs, actors))
    while count < jobs:
        yield count
        following = count + max(1, count // 16)
        multiple = (count // actors + 1) * actors
        count = min(following, multiple) if multiple <= 2 * fewest + actors else following
    if jobs:
        yield jobs


def _cut(lengths: Sequence[int], count: int, fused: int) -> list[int]:
    """Sizes of `count` runs of neighbours, none longer than `fused`, with sums as equal as can be.

    Each takes jobs until it is as near as it gets to an equal part of what is left.
    """
    sizes = []
    left, start = sum(lengths), 0
    for cohorts in range(count, 0, -1):
        jobs = len(lengths) - start
        fewest = max(1, jobs - fused * (cohorts - 1))
        most = min(fused, jobs - (cohorts - 1))
        size, total = fewest, sum(lengths[start : start + fewest])
        while size < most and 2 * (left - total * cohorts) >= lengths[start + size] * cohorts:
            total += lengths[start + size]
            size += 1
        sizes.append(size)
        start += size
        left -= total
    return sizes


def _sums(lengths: Sequence[int], sizes: Sequence[int]) -> list[int]:
    rest = iter(lengths)
    return [sum(next(rest) for _ in range(size)) for size in sizes]


def _loads(budgets: list[int], actors: int) -> tuple[int, ...]:
    """Tokens of each actor when each takes the next job as it becomes free."""
    loads = [0] * actors
    for budget in budgets:
        heapq.heapreplace(loads, loads[0] + budget)
    return tuple(sorted(loads, reverse=True))
