"""The actor: a process that has loaded the base and trains what it is handed.

Knows nothing of other actors, of queues or of retries, nor of what a job computes. It has a job
running and at the most one on deck, whose data it reads ahead; how a job went it tells by
yielding reports, few enough that a driver can listen to many actors.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.schema import RunConfig
from expert_trainer.crew import Place, Share
from expert_trainer.job import Job, JobItem, MemberFailed, Outcome, StepTaken

if TYPE_CHECKING:
    from expert_trainer.workbench import Workbench

REPORT_S = 0.5
"""Seconds between two reports of an actor's steps."""
ASIDE = "aside"
"""Concurrency group of the calls that do not wait for the job that is running."""

MakeBench = Callable[[RunConfig], "Workbench"]


@dataclass(frozen=True, slots=True)
class Opened:
    """What an actor that is ready says of itself."""

    device: str
    pid: int


@dataclass(frozen=True, slots=True)
class Began:
    """The actor has taken the job up: the first report."""


@dataclass(frozen=True, slots=True)
class Ended:
    """All members have ended: the last report."""

    seconds: float
    """Since the actor began its first job."""
    computing: float
    """Of these, inside forward, backward and optimiser steps."""


Report = Began | JobItem | Ended


def start_trainer(name: str, place: Place, share: Share) -> Any:
    """Start an actor, by name, at a place; returns its handle.

    It lives as long as the handle's owner, or until it is killed; Ray never restarts it.
    """
    remote: Any = ray.remote
    actor_class = remote(concurrency_groups={ASIDE: 1})(Trainer)
    return actor_class.options(
        name=name,
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        max_restarts=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
    ).remote(share.cpus, share.gpus, place.first_core)


def end_trainer(handle: Any) -> None:
    """Tell Ray to end an actor's process, if it still lives; this does not wait."""
    ray.kill(handle)


class Trainer:
    """A process with the base loaded once."""

    def __init__(self, cores: int, gpus: float, first_core: int | None) -> None:
        """Take the cores; the base comes with `open`."""
        # before torch is imported: its thread pool takes its size and its cores from here
        os.environ["OMP_NUM_THREADS"] = str(cores)
        if gpus == 0:  # Ray leaves an actor that asked for none with the sight of all
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._cores = sorted(os.sched_getaffinity(0))
        if first_core is not None:
            mine = self._cores[first_core : first_core + cores]
            if len(mine) == cores:
                _pin(mine)
                self._cores = mine
        self._threads = cores
        self._bench: Workbench | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._lock = threading.Lock()
        self._ahead: dict[int, Future[Any]] = {}
        self._begun = 0
        """Number of the newest job that has been begun."""
        self._first_job_at: float | None = None

    def open(self, config: RunConfig, make_bench: MakeBench | None = None) -> Opened:
        """Load what jobs need: by default the base, with the workbench around it."""
        self._bench = (make_bench or _workbench())(config)
        if torch := sys.modules.get("torch"):  # Ray may have imported it before the actor was here
            torch.set_num_threads(self._threads)
        device = f"cores:{self._cores[0]}-{self._cores[-1]}"
        if (
            str(self._bench.base.device) != "cpu"
        ):  # this process sees only the GPU that it was given
            device = f"cuda:{os.environ.get('CUDA_VISIBLE_DEVICES', '0')}"
        return Opened(device=device, pid=os.getpid())

    def answer(self) -> None:
        """Be there, whatever else is going on."""

    def read_ahead(self, number: int, job: Job) -> None:
        """Begin to read the data of the job that is on deck."""
        with self._lock:
            if number > self._begun:
                self._ahead[number] = self._reader.submit(job.read, self._opened)

    def run(self, number: int, job: Job) -> Iterator[tuple[Report, ...]]:
        """Run a job.

        Args:
            number: its place in the sequence of this actor's jobs, from 1.
            job: what to do.
        """
        with self._lock:
            self._begun = number
            ahead = self._ahead.pop(number, None)
        if self._first_job_at is None:
            self._first_job_at = time.monotonic()
        yield (Began(),)
        data = job.read(self._opened) if ahead is None else ahead.result()
        del ahead
        last: list[Report] = []
        steps = _Steps()
        unfinished = set(job.members)
        for item in job.run(self._opened, data):
            if isinstance(item, StepTaken):
                steps.add(item)
                if steps.due:
                    yield steps.report()
                continue
            if isinstance(item, Outcome | MemberFailed):
                unfinished.discard(item.id)
                steps.forget(item.id)
            if unfinished:
                yield (item,)
            else:  # travels with the end, which follows at once
                last.append(item)
        seconds = time.monotonic() - self._first_job_at
        yield (*last, Ended(seconds, self._opened.computing.seconds))

    @property
    def _opened(self) -> Workbench:
        assert self._bench is not None, "open comes first"
        return self._bench


def _workbench() -> MakeBench:
    from expert_trainer.workbench import Workbench

    return Workbench


class _Steps:
    """Steps since the last report: of each member the newest, with the mean of its losses."""

    def __init__(self) -> None:
        self._reported_at = 0.0
        self._newest: dict[str, StepTaken] = {}
        self._losses: dict[str, list[float]] = {}

    def add(self, item: StepTaken) -> None:
        self._newest[item.id] = item
        self._losses.setdefault(item.id, []).append(item.loss)

    def forget(self, member: str) -> None:
        self._newest.pop(member, None)
        self._losses.pop(member, None)

    @property
    def due(self) -> bool:
        return time.monotonic() - self._reported_at >= REPORT_S

    def report(self) -> tuple[StepTaken, ...]:
        means = {member: sum(losses) / len(losses) for member, losses in self._losses.items()}
        newest = [replace(item, loss=means[item.id]) for item in self._newest.values()]
        self._newest.clear()
        self._losses.clear()
        self._reported_at = time.monotonic()
        return tuple(newest)


def _pin(cores: list[int]) -> None:
    """Keep this process to some cores: all its threads, as jobs run in one that is here already."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)
