"""Jobs that sleep, for the scheduler's benchmark: a module of its own, so that actors import it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from configs.schema import RunConfig
from expert_trainer.job import Job, JobItem, Outcome
from expert_trainer.trainer import MakeBench
from expert_trainer.workbench import Stopwatch

POLL_S = 0.05
LONGEST_START_S = 300.0


@dataclass(frozen=True)
class Nap:
    """One member that sleeps."""

    id: str
    seconds: float

    @property
    def members(self) -> tuple[str, ...]:
        return (self.id,)

    @property
    def steps(self) -> int:
        return 1

    def steps_of(self, member: str) -> int:
        return 1

    def only(self, members: Sequence[str]) -> Job:
        return self

    def read(self, bench: Any) -> None:
        return None

    def run(self, bench: Any, data: Any) -> Iterator[JobItem]:
        with bench.computing:
            begin = time.time()
            time.sleep(self.seconds)
            end = time.time()
        yield Outcome(self.id, (begin, end))


class Bed:
    """Stands in for the workbench; ready when all are, so that the jobs find all actors there."""

    def __init__(self, config: RunConfig, directory: Path, actors: int) -> None:
        self.base = SimpleNamespace(device="cpu")
        self.computing = Stopwatch()
        (directory / str(time.time_ns())).touch()
        deadline = time.monotonic() + LONGEST_START_S
        while len(list(directory.iterdir())) < actors and time.monotonic() < deadline:
            time.sleep(POLL_S)


def make_bed(directory: Path, actors: int) -> MakeBench:
    return partial(Bed, directory=directory, actors=actors)  # type: ignore[return-value]
