"""The driver's loop: jobs to actors, their reports to events.

No channel leads from one job to another; an actor hears of its jobs alone and reports to the
driver by yielding. Knows nothing of what a job does, only that its members take steps and end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from configs.schema import RunConfig
from expert_trainer.actor import Actor
from expert_trainer.backlog import Backlog
from expert_trainer.errors import PoolError, TrainerError
from expert_trainer.job import Job, Measured, MemberFailed, Outcome, StepTaken
from expert_trainer.roster import Roster
from expert_trainer.runtime import await_nodes, ray_session
from expert_trainer.schedule import Crew, may_wait, plan_crew
from expert_trainer.trainer import Began, Ended, MakeBench, Report
from expert_trainer.types import (
    ActorLost,
    ActorUp,
    ExpertFailed,
    ExpertMeasured,
    ExpertProgress,
    ExpertStarted,
    JobFinished,
    OnEvent,
    PoolEnded,
    PoolStarted,
)

PoolEvent = (
    ActorUp
    | ActorLost
    | ExpertStarted
    | ExpertProgress
    | ExpertMeasured
    | ExpertFailed
    | JobFinished
    | PoolEnded
)


class Pool:
    """A crew of actors. Use inside a `ray_session`, once."""

    def __init__(
        self, config: RunConfig, crew: Crew, *, make_bench: MakeBench | None = None
    ) -> None:
        """Describe the pool; `run` starts the actors.

        Args:
            config: the run.
            crew: what each actor holds, and how many there may be.
            make_bench: what an actor loads; default: the `Workbench`, with the base.
        """
        self._roster = Roster(config, crew, make_bench)
        self._max_retries = config.experts.max_retries
        self._backlog = Backlog((), 0)
        self._clocks: dict[str, Ended] = {}
        """The newest end of a job that each actor reported."""

    def run(self, jobs: Sequence[Job]) -> Iterator[PoolEvent]:
        """Run all jobs, longest first, each on the first actor that is free; every member ends.

        What fails, by an error of its own or by its actor's death, is tried again up to
        `experts.max_retries` times, then reported for good while the others go on. The loss of a
        node is no failure of what ran there. While there is no node at all, the pool waits.

        Raises:
            PoolError: actors start on none of the nodes.
            TrainerError: likewise, with the cause that actors gave, such as BaseModelError.
        """
        self._backlog = Backlog(jobs, self._max_retries)
        try:
            while self._backlog.open:
                if time.monotonic() >= self._roster.tend_at:
                    yield from self._roster.tend(self._backlog)
                self._hand_out()
                for actor in self._answering():
                    yield from self._hear(actor)
        finally:
            self._roster.close()
        clocks = self._clocks.values()
        yield PoolEnded(
            sum(clock.seconds for clock in clocks), sum(clock.computing for clock in clocks)
        )

    def _hand_out(self) -> None:
        """Give work to those that idle, then a next job to those that may keep one waiting."""
        actors, backlog = self._roster.actors, self._backlog
        for actor in actors:
            if actor.idle and len(backlog):
                actor.give(backlog.take())
        for actor in actors:
            if actor.running is None or not actor.has_room or not len(backlog):
                continue
            steps_left = actor.running.assignment.steps_left
            if may_wait(steps_left, backlog.behind, len(actors)):
                actor.give(backlog.take())

    def _answering(self) -> list[Actor]:
        """Wait for actors to answer, until nodes are to be looked at; returns those that have."""
        actors = self._roster.actors
        waiting = {actor.awaited: actor for actor in actors if actor.awaited is not None}
        timeout = max(0.0, self._roster.tend_at - time.monotonic())
        if not waiting:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
        if ready:  # Ray returns no more than it was asked for, and often there are more
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        return [waiting[reference] for reference in ready]

    def _hear(self, actor: Actor) -> Iterator[PoolEvent]:
        """Act on one answer of an actor, or on Ray's about it."""
        try:
            if actor.fallen:
                ray.get(actor.awaited)
                actor.awaited = None  # its process still lives: it is asked again
            elif not actor.opened:
                yield self._roster.welcome(actor, ray.get(actor.awaited))
            else:
                for report in ray.get(next(actor.awaited)):
                    yield from self._take(actor, report)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            yield from self._failed(actor, cause)
        except ActorDiedError as error:
            self._roster.dead(actor, _lost(error))
        except RayError as error:  # out of reach, for now or for good
            if actor.fallen:
                actor.awaited = None
            else:
                self._roster.end(actor, _lost(error))

    def _take(self, actor: Actor, report: Report) -> Iterator[PoolEvent]:
        """Act on one report of a running job."""
        assert actor.running is not None, "only a running job reports"
        assignment = actor.running.assignment
        match report:
            case Began():
                attempts = [self._backlog.attempt(member) for member in assignment.job.members]
                yield from assignment.started(attempts)
            case StepTaken():
                yield assignment.moved(report)
            case Measured():
                yield assignment.measured(report)
            case Outcome():
                self._backlog.done(report.id)
                yield assignment.finished(report)
            case MemberFailed():
                assignment.drop(report.id)
                yield from self._backlog.fail(assignment.job, [report.id], report.cause)
            case Ended():
                assert not assignment.unfinished, "a job ends all its members"
                self._clocks[actor.name] = report
                actor.turn()

    def _failed(self, actor: Actor, cause: Exception) -> Iterator[PoolEvent]:
        """A living actor has raised an error, from its start or from its running job."""
        trusted = actor.running is not None and isinstance(cause, TrainerError)
        if actor.running is not None:
            assignment, actor.running = actor.running.assignment, None
            yield from self._backlog.fail(assignment.job, assignment.unfinished, cause)
        if trusted:
            actor.turn()
        else:  # what else has broken in that process, nobody knows
            self._roster.end(actor, cause)


def run_jobs(
    jobs: Sequence[Job], config: RunConfig, on_event: OnEvent
) -> Iterator[JobFinished | ExpertFailed]:
    """Run jobs on the Ray cluster at hand, longest first; yields each member's end, good or bad.

    Args:
        jobs: what to do; without any, Ray is not even started.
        config: the run.
        on_event: told of everything on the way but the good ends, which are the caller's to tell.

    Raises:
        PoolError: the cluster cannot be reached or has not what the config asks for, or actors
            do not start.
        BaseModelError: the base cannot be loaded.
    """
    if not jobs:
        return
    with ray_session():
        crew = plan_crew(len(jobs), config.experts, await_nodes())
        members = sum(len(job.members) for job in jobs)
        on_event(PoolStarted(members, crew.actors, sum(job.steps for job in jobs)))
        for event in Pool(config, crew).run(jobs):
            if not isinstance(event, JobFinished):
                on_event(event)
            if isinstance(event, JobFinished) or (isinstance(event, ExpertFailed) and event.final):
                yield event


def _lost(error: RayError) -> Exception:
    """Why an actor is gone: Ray's words for a death run over many lines."""
    if isinstance(error, RayActorError):
        return PoolError(f"its process died ({type(error).__name__})")
    return error
