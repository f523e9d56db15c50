"""The actor's class in this very process; on Ray it is tested with the pool."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from configs.schema import RunConfig
from expert_trainer import trainer as module
from expert_trainer.errors import ExpertError
from expert_trainer.job import Job, JobItem, Measured, MemberFailed, Outcome, StepTaken
from expert_trainer.trainer import Began, Ended, Trainer

Script = Callable[[Any, Any], Iterator[JobItem]]


@dataclass
class Scripted:
    """A job that does as it is told."""

    script: Script
    reading: Callable[[], Any] = lambda: None
    members: tuple[str, ...] = ("a",)
    steps: int = 10

    def steps_of(self, member: str) -> int:
        return self.steps

    def only(self, members: Sequence[str]) -> Job:
        raise NotImplementedError

    def read(self, bench: Any) -> Any:
        return self.reading()

    def run(self, bench: Any, data: Any) -> Iterator[JobItem]:
        yield from self.script(bench, data)


@pytest.fixture
def trainer(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = Trainer(1, 0, None)
    bench: Any = SimpleNamespace(
        base=SimpleNamespace(device="cpu"), computing=SimpleNamespace(seconds=2.5)
    )
    opened = made.open(make_config(), lambda config: bench)
    assert opened.pid == os.getpid()
    assert opened.device.startswith("cores:0-")
    return made


def test_reports_begin_and_end_and_the_last_outcome_travels_with_the_end(trainer: Trainer) -> None:
    cause = ExpertError("bad")

    def script(bench: Any, data: Any) -> Iterator[JobItem]:
        yield Measured("a", 3, 1.5)
        yield MemberFailed("b", cause)
        yield Outcome("a", data)

    job = Scripted(script, lambda: "data", members=("a", "b"))
    began, *middle, end = list(trainer.run(1, job))
    assert began == (Began(),)
    assert middle == [(Measured("a", 3, 1.5),), (MemberFailed("b", cause),)]
    outcome, ended = end
    assert outcome == Outcome("a", "data")
    assert isinstance(ended, Ended)
    assert ended.computing == 2.5
    assert ended.seconds >= 0


def test_steps_are_thinned_out_to_means(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPORT_S", 0.2)
    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))

    def script(bench: Any, data: Any) -> Iterator[JobItem]:
        nonlocal now
        for step in range(1, 101):
            yield StepTaken("a", step, float(step), step * 7, step * 0.01)
            yield StepTaken("b", step, 0.5, step * 3, step * 0.01)
            now += 0.005
        yield Outcome("a", None)
        yield Outcome("b", None)

    reports = list(trainer.run(1, Scripted(script, members=("a", "b"))))
    steps = [report for report in reports if all(isinstance(item, StepTaken) for item in report)]
    assert 3 <= len(steps) <= 8, "half a second of steps, five times a second"
    first, second = steps[0], steps[1]
    assert first == (StepTaken("a", 1, 1.0, 7, 0.01),), "the first step is told at once"
    by_id = {item.id: item for item in second if isinstance(item, StepTaken)}
    newest = by_id["a"]
    assert newest.loss == pytest.approx((2 + newest.step) / 2), "the mean since the last report"
    assert newest.tokens == newest.step * 7
    assert by_id["b"].loss == 0.5


def test_the_next_job_is_read_while_one_computes(trainer: Trainer) -> None:
    reading, read = threading.Event(), threading.Event()
    threads = []

    def read_second() -> str:
        threads.append(threading.current_thread())
        reading.set()
        read.wait(60)
        return "second"

    def first(bench: Any, data: Any) -> Iterator[JobItem]:
        assert reading.wait(60), "the second job is being read"
        yield Outcome("a", None)
        read.set()

    def second(bench: Any, data: Any) -> Iterator[JobItem]:
        yield Outcome("a", data)

    run = trainer.run(1, Scripted(first))
    assert next(run) == (Began(),)
    on_deck = Scripted(second, read_second)
    trainer.read_ahead(2, on_deck)
    try:
        list(run)
    finally:
        read.set()
    assert list(trainer.run(2, on_deck))[-1][0] == Outcome("a", "second")
    assert len(threads) == 1, "it is read once"
    assert threads[0] is not threading.current_thread()
    trainer.read_ahead(2, on_deck)
    assert len(threads) == 1, "nor when its turn has come already"


def test_an_error_while_reading_ahead_belongs_to_the_job_that_was_read(trainer: Trainer) -> None:
    def unreadable() -> None:
        raise ExpertError("the shard is gone")

    def fine(bench: Any, data: Any) -> Iterator[JobItem]:
        yield Outcome("a", None)

    trainer.read_ahead(2, Scripted(fine, unreadable))
    list(trainer.run(1, Scripted(fine)))
    with pytest.raises(ExpertError, match="the shard is gone"):
        list(trainer.run(2, Scripted(fine, unreadable)))
    list(trainer.run(3, Scripted(fine)))


@pytest.mark.parametrize(("gpus", "seen"), [(0, ""), (0.5, "0,1")])
def test_an_actor_without_a_gpu_sees_none(
    monkeypatch: pytest.MonkeyPatch, gpus: float, seen: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    Trainer(1, gpus, None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_an_actor_on_a_gpu_names_the_one_that_ray_gave_it(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    bench: Any = SimpleNamespace(base=SimpleNamespace(device="cuda:0"))
    assert Trainer(1, 1, None).open(make_config(), lambda config: bench).device == "cuda:3"


PINNED = """
import os, threading
from expert_trainer.trainer import Trainer
ready, end = threading.Event(), threading.Event()
other = threading.Thread(target=lambda: (ready.set(), end.wait()))
other.start()
ready.wait()
Trainer(1, 0, 1)
print(os.sched_getaffinity(0), os.sched_getaffinity(other.native_id), os.environ["OMP_NUM_THREADS"])
end.set()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_all_threads_of_an_actor_are_pinned_to_its_cores() -> None:
    second = sorted(os.sched_getaffinity(0))[1]
    done = subprocess.run(
        [sys.executable, "-c", PINNED], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n")[0] == f"{{{second}}} {{{second}}} 1"
