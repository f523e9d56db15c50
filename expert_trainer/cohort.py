"""Experts that one actor trains together, each to its own finished directory.

They share nothing but passes of the base: each has its rows, its slot, its schedule, and leaves
when its steps are done, when its held-out loss no longer falls or when it fails; the others go on.
Knows nothing of Ray, of queues or of the gate.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from expert_trainer.errors import DivergedError, ExpertError, TrainerError
from expert_trainer.expert import Result, TrainJob
from expert_trainer.job import JobItem, MemberFailed, Outcome
from expert_trainer.storage import Storage
from expert_trainer.types import Example

if TYPE_CHECKING:
    from expert_trainer.checkpoint import CheckpointFile, MemberState
    from expert_trainer.member import Member
    from expert_trainer.workbench import Workbench


@dataclass(frozen=True)
class Material:
    """A member's documents, as tokens."""

    train: list[Example]
    heldout: list[Example]


Reading = Material | Result | ExpertError
"""What reading a member's shards gave: its documents, a result that was there, or why not."""


@dataclass(frozen=True)
class Cohort:
    """The experts of one job; at least one."""

    jobs: tuple[TrainJob, ...]
    checkpoints: Storage
    """Where the checkpoint lies while the cohort is trained."""
    checkpoint_s: float
    """Seconds between two checkpoints; 0: none."""
    origin: Cohort | None = None
    """The cohort that this one is a part of, from whose checkpoint it may go on."""

    @property
    def members(self) -> tuple[str, ...]:
        """The experts' ids."""
        return tuple(job.id for job in self.jobs)

    @property
    def steps(self) -> int:
        """Steps of all members together."""
        return sum(job.steps for job in self.jobs)

    def steps_of(self, member: str) -> int:
        """Steps that a member will take at the most."""
        return next(job.steps for job in self.jobs if job.id == member)

    @property
    def digest(self) -> str:
        """Hash of everything that its members' adapters depend on."""
        parts = [f"{job.id}:{job.digest}" for job in self.jobs]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def only(self, members: Sequence[str]) -> Cohort:
        """Some of the members; they go on from the whole cohort's checkpoint."""
        jobs = tuple(job for job in self.jobs if job.id in members)
        return replace(self, jobs=jobs, origin=self)

    def read(self, bench: Workbench) -> dict[str, Reading]:
        """The members' documents; may be called while another job computes."""
        return {job.id: _read(job, bench) for job in self.jobs}

    def run(self, bench: Workbench, data: Mapping[str, Reading]) -> Iterator[JobItem]:
        """Train, measure and write the experts; the outcomes are `Result`s.

        Members fail alone: on a shard that cannot be read or has nothing to learn, on a loss that
        is not finite, or where their directory cannot be written.
        """
        bench.adapter.resize(len(self.jobs))
        running = []
        for item in self._prepare(bench, data):
            if isinstance(item, Outcome | MemberFailed):
                yield item
            else:
                running.append(item)
        yield from self._train(bench, running)
        self._clear()

    def _prepare(
        self, bench: Workbench, data: Mapping[str, Reading]
    ) -> Iterator[Member | Outcome | MemberFailed]:
        """What there is to train, each where its checkpoint left it, and what has ended already."""
        from expert_trainer.member import Member

        saved: dict[str, MemberState] | None = None
        for slot, job in enumerate(self.jobs):
            reading = data[job.id]
            if isinstance(reading, Result):
                yield Outcome(job.id, reading)
                continue
            if isinstance(reading, ExpertError):
                yield MemberFailed(job.id, reading)
                continue
            try:
                member = Member(job, slot, bench, reading.train, reading.heldout)
            except ExpertError as error:
                yield MemberFailed(job.id, error)
                continue
            saved = self._saved() if saved is None else saved
            if job.id in saved:
                member.restore(saved[job.id])
            yield member

    def _train(self, bench: Workbench, running: list[Member]) -> Iterator[JobItem]:
        """Train members until all have left."""
        written_at = time.monotonic()
        while running:
            if done := [member for member in running if member.done]:
                if len(done) < len(running):
                    written_at = self._write(running)
                for member in done:
                    running.remove(member)
                    yield _finish(member)
                continue
            yield from _step(bench, running)
            if running and time.monotonic() - written_at >= self.checkpoint_s:
                written_at = self._write(running)

    @property
    def _file(self) -> CheckpointFile:
        from expert_trainer.checkpoint import CheckpointFile

        return CheckpointFile(self.checkpoints, self.digest)

    def _saved(self) -> dict[str, MemberState]:
        """Where an earlier run has left the members."""
        saved = self._file.read()
        if not saved and self.origin is not None:
            saved = self.origin._saved()
        return saved

    def _clear(self) -> None:
        """Take away the checkpoint, and that of the whole where this was the last part of it."""
        self._file.remove()
        if self.origin is not None and all(job.finished() for job in self.origin.jobs):
            self.origin._clear()

    def _write(self, running: Sequence[Member]) -> float:
        """Write a checkpoint, if any are wanted; returns the time."""
        if self.checkpoint_s > 0:
            self._file.write({member.job.id: member.state() for member in running})
        return time.monotonic()


def _read(job: TrainJob, bench: Workbench) -> Reading:
    try:
        if (result := job.finished()) is not None:
            return result
        return Material(bench.examples(job.shards), bench.examples(job.heldout))
    except ExpertError as error:
        return error
    except TrainerError as error:
        return ExpertError(f"{job.id}: {error}")


def _step(bench: Workbench, running: list[Member]) -> Iterator[JobItem]:
    """Move all members on by a step; those that cannot go on leave the list."""
    from expert_trainer.optimise import draw, take_step

    members, experts = list(running), running[0].job.experts
    learners = [member.learner for member in members]
    passes = draw(learners, experts, bench.base.device)
    with bench.computing:
        taken = take_step(bench.model, bench.adapter, learners, passes, experts)
    for member, step in zip(members, taken, strict=True):
        if step.finite:
            yield member.note(step)
            if member.evaluation_due:
                yield member.evaluate()
        else:
            running.remove(member)
            yield MemberFailed(member.job.id, _diverged(member, step.loss))


def _finish(member: Member) -> Outcome | MemberFailed:
    try:
        return Outcome(member.job.id, member.finish())
    except ExpertError as error:
        return MemberFailed(member.job.id, error)


def _diverged(member: Member, loss: float) -> DivergedError:
    job = member.job
    return DivergedError(
        f"{job.id}: the loss is {loss} at step {member.progress.step + 1} of {job.steps} with "
        f"learning rate {job.learning_rate:g}; lower experts.learning_rate"
    )
