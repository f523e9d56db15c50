"""One job in one actor's hands: how far its members are, told as events.

Knows nothing of Ray, of the queue or of other jobs.
"""

from __future__ import annotations

from collections.abc import Sequence

from expert_trainer.job import Job, Measured, Outcome, StepTaken
from expert_trainer.types import (
    ExpertMeasured,
    ExpertProgress,
    ExpertStarted,
    JobFinished,
)


class Assignment:
    """A job and the actor that it was given to."""

    def __init__(self, job: Job, actor: str) -> None:
        """Describe it; nothing has begun."""
        self.job = job
        self.actor = actor
        self.steps_left = 0
        """Steps, at the most, until all members have ended."""
        self._left: dict[str, int] = {}
        """Likewise, by member; those that have ended are not in it."""
        self._since: dict[str, tuple[int, float]] = {}
        """Tokens and seconds of each member from which its speed is counted."""
        for member in job.members:
            self._left[member] = job.steps_of(member)
            self.steps_left += self._left[member]

    @property
    def unfinished(self) -> Sequence[str]:
        """Members without an end, in the job's order."""
        return tuple(self._left)

    def started(self, attempts: Sequence[int]) -> list[ExpertStarted]:
        """The actor has begun; `attempts` are those of the members, in their order."""
        return [
            ExpertStarted(member, self.actor, self.job.steps_of(member), attempt)
            for member, attempt in zip(self.job.members, attempts, strict=True)
        ]

    def moved(self, item: StepTaken) -> ExpertProgress:
        """A member took steps."""
        steps = self.job.steps_of(item.id)
        self._set_left(item.id, steps - item.step)
        # a run that goes on from a checkpoint counts tokens from the start, seconds from its own
        fresh = (0, 0.0) if item.step == 1 else (item.tokens, item.seconds)
        tokens, seconds = self._since.setdefault(item.id, fresh)
        speed = (item.tokens - tokens) / max(item.seconds - seconds, 1e-9)
        return ExpertProgress(item.id, self.actor, item.step, steps, item.loss, item.tokens, speed)

    def measured(self, item: Measured) -> ExpertMeasured:
        """A member's held-out loss is known."""
        return ExpertMeasured(item.id, item.step, item.loss)

    def finished(self, item: Outcome) -> JobFinished:
        """A member has ended well."""
        self.drop(item.id)
        return JobFinished(item.id, item.value)

    def drop(self, member: str) -> None:
        """A member has ended, well or not."""
        self._set_left(member, 0)
        del self._left[member]

    def _set_left(self, member: str, steps: int) -> None:
        self.steps_left += steps - self._left[member]
        self._left[member] = steps
