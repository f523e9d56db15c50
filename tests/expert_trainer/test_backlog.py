from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_trainer.backlog import Backlog
from expert_trainer.errors import DivergedError, ExpertError
from expert_trainer.job import Job, JobItem
from expert_trainer.schedule import Waiting


@dataclass(frozen=True)
class Work:
    """A job that is never run."""

    members: tuple[str, ...]
    steps_each: int = 1

    @property
    def steps(self) -> int:
        return self.steps_each * len(self.members)

    def steps_of(self, member: str) -> int:
        return self.steps_each

    def only(self, members: Sequence[str]) -> "Work":
        return Work(tuple(members), self.steps_each)

    def read(self, bench: Any) -> Any:
        raise NotImplementedError

    def run(self, bench: Any, data: Any) -> Iterator[JobItem]:
        raise NotImplementedError


def fail(backlog: Backlog, job: Job, *members: str, cause: Exception | None = None) -> list[str]:
    """Members fail; returns those that are given up."""
    events = backlog.fail(job, members, cause or ExpertError("bad"))
    assert [event.id for event in events] == list(members)
    return [event.id for event in events if event.final]


def waiting(backlog: Backlog) -> list[tuple[str, ...]]:
    jobs = [backlog.take() for _ in range(len(backlog))]
    for job in jobs:
        backlog.put_back(job)
    return [job.members for job in jobs]


def steps_waiting(backlog: Backlog) -> list[int]:
    jobs = [backlog.take() for _ in range(len(backlog))]
    for job in jobs:
        backlog.put_back(job)
    return [job.steps for job in jobs]


def test_longest_first_and_in_order_among_equals() -> None:
    backlog = Backlog([Work(("a",), 3), Work(("b", "c"), 2), Work(("d",), 9), Work(("e",), 3)], 0)
    assert backlog.open == 5
    assert backlog.behind == Waiting(jobs=3, steps=10, longest=9, shortest=3)
    assert [backlog.take().members for _ in range(4)] == [("d",), ("b", "c"), ("a",), ("e",)]
    assert (len(backlog), backlog.open) == (0, 5)


def test_what_comes_back_unharmed_is_no_attempt() -> None:
    backlog = Backlog([Work(("a",))], 0)
    for _ in range(9):
        backlog.put_back(backlog.take())
        assert backlog.attempt("a") == 1


def test_a_job_that_fails_is_tried_whole_then_apart_then_given_up() -> None:
    backlog = Backlog([Work(("a", "b", "c"))], 2)
    job = backlog.take()
    assert fail(backlog, job, "a", "b", "c") == []
    assert waiting(backlog) == [("a", "b", "c")]
    job = backlog.take()
    backlog.done("a")
    assert fail(backlog, job, "b", "c") == []
    assert waiting(backlog) == [("b",), ("c",)]
    alone = backlog.take()
    assert backlog.attempt("b") == 3
    assert fail(backlog, alone, "b") == ["b"]
    backlog.take()
    backlog.done("c")
    assert backlog.open == 0


@pytest.mark.parametrize(("max_retries", "tries"), [(0, 1), (1, 2), (5, 6)])
def test_a_poison_member_fails_alone_wherever_a_retry_is_allowed(
    max_retries: int, tries: int
) -> None:
    backlog = Backlog([Work(("good", "poison"))], max_retries)
    ended: dict[str, str] = {}
    runs = 0
    while backlog.open:
        job = backlog.take()
        if "poison" in job.members:
            runs += 1
            ended |= dict.fromkeys(fail(backlog, job, *job.members), "failed")
        else:
            backlog.done("good")
            ended["good"] = "done"
    assert runs == tries
    assert ended == {"good": "done" if max_retries else "failed", "poison": "failed"}


def test_a_member_that_fails_leaves_its_job_alone() -> None:
    backlog = Backlog([Work(("a", "b"))], 2)
    job = backlog.take()
    fail(backlog, job, "a")
    assert waiting(backlog) == [("a",)]
    assert (backlog.attempt("a"), backlog.attempt("b")) == (2, 1)


def test_a_diverged_member_is_tried_once_more() -> None:
    backlog = Backlog([Work(("a",))], 9)
    assert fail(backlog, backlog.take(), "a") == []
    assert fail(backlog, backlog.take(), "a", cause=DivergedError("nan")) == []
    assert fail(backlog, backlog.take(), "a", cause=DivergedError("nan")) == ["a"]


@given(
    sizes=st.lists(st.integers(1, 5), max_size=8),
    max_retries=st.integers(0, 4),
    data=st.data(),
)
def test_every_member_ends_once_and_is_never_in_two_places(
    sizes: list[int], max_retries: int, data: st.DataObject
) -> None:
    names = iter(f"m{i}" for i in range(100))
    jobs = [Work(tuple(next(names) for _ in range(n)), data.draw(st.integers(1, 9))) for n in sizes]
    backlog = Backlog(jobs, max_retries)
    everyone = [member for job in jobs for member in job.members]
    running: list[tuple[Job, list[str]]] = []
    ends: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    while backlog.open:
        inside = [m for job in waiting(backlog) for m in job] + [
            m for _, left in running for m in left
        ]
        assert sorted(inside + list(ends)) == sorted(everyone)
        if len(backlog):
            lengths = steps_waiting(backlog)
            assert backlog.behind == Waiting(
                len(lengths) - 1, sum(lengths[1:]), lengths[0], lengths[-1]
            )
        if len(backlog) and (not running or data.draw(st.booleans())):
            job = backlog.take()
            running.append((job, list(job.members)))
            continue
        job, left = running[data.draw(st.integers(0, len(running) - 1))]
        what = data.draw(st.sampled_from(["done", "member fails", "job fails", "node goes"]))
        if what == "node goes":
            backlog.put_back(job.only(left))
            left.clear()
        elif what == "job fails":
            failures.update(left)
            ends.update(fail(backlog, job, *left))
            left.clear()
        else:
            member = left.pop(data.draw(st.integers(0, len(left) - 1)))
            if what == "done":
                backlog.done(member)
                ends[member] += 1
            else:
                failures[member] += 1
                ends.update(fail(backlog, job, member))
        running = [(job, left) for job, left in running if left]
        assert all(failures[member] <= max_retries + 1 for member in everyone)
    assert all(ends[member] == 1 for member in everyone)
