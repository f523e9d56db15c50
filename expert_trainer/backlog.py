"""Jobs that wait for an actor, and how often each of their members has failed.

Knows nothing of actors or nodes; whoever asks says what a job's end was.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from expert_trainer.errors import DivergedError, describe
from expert_trainer.job import Job
from expert_trainer.schedule import Waiting
from expert_trainer.types import ExpertFailed

TOGETHER = 2
"""Failures of a whole job after which its members are tried apart: one of them may be the cause."""
MAX_DIVERGED = 1
"""Retries of a loss that diverged: the same rows, seed and rate lead to the same end. One more try
tells a device's error from that."""


class Backlog:
    """Jobs by length, the longest first.

    A member is always in one of three states: its job waits here, its job is in an actor's hands,
    or it has ended.
    """

    def __init__(self, jobs: Sequence[Job], max_retries: int) -> None:
        """Queue jobs, all of whose members have different names.

        Args:
            jobs: in any order; of equally long ones, the first here is always first.
            max_retries: times that a failed member is tried again.
        """
        self._max_retries = max_retries
        self._failures: Counter[str] = Counter()
        self._diverged: Counter[str] = Counter()
        members = [member for job in jobs for member in job.members]
        self._order = {member: number for number, member in enumerate(members)}
        assert len(self._order) == len(members), "names are different"
        self._open = set(members)
        self._heap: list[tuple[int, int, Job]] = []
        self._steps = 0
        self._shortest = 0
        """Steps of the shortest job that waits: as the longest leave first, it is the last."""
        for job in jobs:
            self.put_back(job)

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def open(self) -> int:
        """Members that have not ended."""
        return len(self._open)

    @property
    def behind(self) -> Waiting:
        """What would be left if the next job, which there is, were taken."""
        longest = -self._heap[0][0]
        jobs = len(self._heap) - 1
        return Waiting(jobs, self._steps - longest, longest, self._shortest)

    def attempt(self, member: str) -> int:
        """Number of the try that a member's next or present run is; 1 is the first."""
        return self._failures[member] + 1

    def take(self) -> Job:
        """The longest job, which is its taker's from now on."""
        steps, _, job = heapq.heappop(self._heap)
        self._steps += steps
        return job

    def put_back(self, job: Job) -> None:
        """Queue a job whose run, if it had any, was ended by no fault of its own."""
        heapq.heappush(self._heap, (-job.steps, self._order[job.members[0]], job))
        self._shortest = min(self._shortest, job.steps) if len(self) > 1 else job.steps
        self._steps += job.steps

    def done(self, member: str) -> None:
        """A member has ended well."""
        self._open.remove(member)

    def fail(self, job: Job, members: Sequence[str], cause: Exception) -> list[ExpertFailed]:
        """Members of a job have failed together, or one has failed alone; queue what is retried.

        Members that fail together are tried again together, and apart from the second time on or
        where it is their last try: so one that takes its process down does not end the others.
        """
        for member in members:
            self._failures[member] += 1
            self._diverged[member] += isinstance(cause, DivergedError)
        events = [
            ExpertFailed(member, describe(cause), self._failures[member], self._given_up(member))
            for member in members
        ]
        again = [event.id for event in events if not event.final]
        self._open -= {event.id for event in events if event.final}
        if any(self._failures[member] >= min(TOGETHER, self._max_retries) for member in again):
            for member in again:
                self.put_back(part(job, [member]))
        elif again:
            self.put_back(part(job, again))
        return events

    def _given_up(self, member: str) -> bool:
        return self._failures[member] > self._max_retries or self._diverged[member] > MAX_DIVERGED


def part(job: Job, members: Sequence[str]) -> Job:
    """The job for some of its members, itself where that is all of them."""
    return job if len(members) == len(job.members) else job.only(tuple(members))
