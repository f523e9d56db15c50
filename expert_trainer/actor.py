"""One training actor as the driver sees it: its start, the jobs in its hands, its end.

Knows nothing of queues, of nodes or of other actors.
"""

from __future__ import annotations

import time
from typing import Any

from expert_trainer.assignment import Assignment
from expert_trainer.crew import Node, Place
from expert_trainer.job import Job
from expert_trainer.trainer import ASIDE


class Handed:
    """A job that was submitted to an actor, and Ray's generator of the reports."""

    def __init__(self, assignment: Assignment, stream: Any) -> None:
        """Hold both together."""
        self.assignment = assignment
        self.stream = stream


class Actor:
    """A process that is starting, running jobs, idle, or fallen: not trusted any more."""

    def __init__(self, name: str, node: Node, place: Place, handle: Any, opening: Any) -> None:
        """Take in an actor that was told to open.

        Args:
            name: its name in Ray.
            node: where it lives.
            place: on that node.
            handle: Ray's.
            opening: the reference to its answer.
        """
        self.name = name
        self.node = node
        self.place = place
        self.handle = handle
        self.awaited: Any = opening
        """What Ray is to answer next; none where nothing is asked."""
        self.opened = False
        self.running: Handed | None = None
        self.deck: Handed | None = None
        self.fallen: Exception | None = None
        """Why it is not trusted any more."""
        self.dead_at: float | None = None
        """When Ray knew for certain that its process is gone."""
        self._handed = 0

    @property
    def idle(self) -> bool:
        """It waits for work."""
        return self.opened and self.fallen is None and self.running is None

    @property
    def has_room(self) -> bool:
        """It runs a job and has none on deck."""
        return self.running is not None and self.deck is None and self.fallen is None

    @property
    def jobs(self) -> int:
        """Jobs in its hands."""
        return (self.running is not None) + (self.deck is not None)

    def opens(self) -> None:
        """It has loaded what it needs and can take jobs."""
        self.opened, self.awaited = True, None

    def give(self, job: Job) -> None:
        """Submit a job: it begins at once, or when the running one ends, its data read by then."""
        self._handed += 1
        if self.running is not None:
            self.handle.read_ahead.options(concurrency_group=ASIDE).remote(self._handed, job)
        # Ray's dashboard and lists of tasks show what runs by this name
        run = self.handle.run.options(num_returns="streaming", name=", ".join(job.members))
        handed = Handed(Assignment(job, self.name), run.remote(self._handed, job))
        if self.running is None:
            self.running, self.awaited = handed, handed.stream
        else:
            self.deck = handed

    def turn(self) -> None:
        """The running job is over, and the one on deck, if any, has taken its place."""
        self.running, self.deck = self.deck, None
        self.awaited = None if self.running is None else self.running.stream

    def fall(self, cause: Exception) -> None:
        """Trust it no more; whoever calls ends its process."""
        self.fallen = self.fallen or cause
        self.awaited = None

    def ask(self) -> None:
        """Have Ray say whether its process is gone."""
        self.awaited = self.handle.answer.options(concurrency_group=ASIDE).remote()

    def dies(self) -> None:
        """Ray knows for certain that its process is gone."""
        self.awaited, self.dead_at = None, time.monotonic()
