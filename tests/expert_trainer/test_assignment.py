from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from expert_trainer.assignment import Assignment
from expert_trainer.job import Job, JobItem, Measured, Outcome, StepTaken
from expert_trainer.types import ExpertMeasured, ExpertStarted, JobFinished


@dataclass(frozen=True)
class Two:
    """A job of two members that is never run."""

    members: tuple[str, ...] = ("a", "b")
    steps: int = 30

    def steps_of(self, member: str) -> int:
        return {"a": 10, "b": 20}[member]

    def only(self, members: Sequence[str]) -> Job:
        raise NotImplementedError

    def read(self, bench: Any) -> Any:
        raise NotImplementedError

    def run(self, bench: Any, data: Any) -> Iterator[JobItem]:
        raise NotImplementedError


def test_items_become_events() -> None:
    assignment = Assignment(Two(), "trainer-0")
    assert assignment.started([1, 3]) == [
        ExpertStarted("a", "trainer-0", 10, 1),
        ExpertStarted("b", "trainer-0", 20, 3),
    ]
    assert assignment.measured(Measured("a", 5, 2.5)) == ExpertMeasured("a", 5, 2.5)
    assert assignment.finished(Outcome("a", "value")) == JobFinished("a", "value")


def test_steps_left_follow_the_members() -> None:
    assignment = Assignment(Two(), "trainer-0")
    assert (assignment.steps_left, assignment.unfinished) == (30, ("a", "b"))
    assignment.moved(StepTaken("a", 4, 1.0, 100, 1.0))
    assignment.moved(StepTaken("b", 5, 1.0, 100, 1.0))
    assert assignment.steps_left == 21
    assignment.finished(Outcome("b", None))  # stopped early
    assert (assignment.steps_left, assignment.unfinished) == (6, ("a",))
    assignment.drop("a")
    assert (assignment.steps_left, assignment.unfinished) == (0, ())


def test_speed_is_that_of_this_run() -> None:
    fresh = Assignment(Two(), "trainer-0")
    assert fresh.moved(StepTaken("a", 1, 3.0, 50, 0.5)).tokens_per_second == pytest.approx(100)
    progress = fresh.moved(StepTaken("a", 4, 2.0, 600, 2.0))
    assert progress.tokens_per_second == pytest.approx(300)
    assert (progress.step, progress.steps, progress.loss, progress.tokens) == (4, 10, 2.0, 600)
    resumed = Assignment(Two(), "trainer-0")
    assert resumed.moved(StepTaken("a", 6, 3.0, 5000, 0.5)).tokens_per_second == 0
    assert resumed.moved(StepTaken("a", 8, 3.0, 5100, 1.0)).tokens_per_second == pytest.approx(200)
