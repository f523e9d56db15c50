"""Event files of a training run for TensorBoard.

Every expert is a run of its own, a directory with the same few tags as all others: TensorBoard
draws one chart per tag with a line per run, so that experts are compared by ticking or filtering
their names. The other way, one run with tags such as `expert-0007/loss`, makes three charts per
expert, 15,000 for 5,000 experts, none of which holds two of them.

No file stays open: an expert's points gather in memory and are appended to its file every few
seconds and at its end. A writer per expert in training would keep a file and a thread for each,
which 64 actors with 16 experts each would carry past the usual limit of 1,024 open files.

Knows nothing of how experts are trained; tensorboardX encodes the points.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploy.output import note
from deploy.training_state import TrainingState
from expert_trainer.types import (
    ExpertFailed,
    ExpertFinished,
    ExpertMeasured,
    ExpertProgress,
    JobFinished,
    PoolEnded,
    TrainEvent,
)

ALL = "all"
"""The run of what is true of all experts together; its steps are seconds."""
WRITE_S = 5.0
"""Seconds between two appends, while events come."""
FILE_VERSION = "brain.Event:2"


def run_directory(scratch: Path) -> Path:
    """Directory for the event files of a run that starts now: `SCRATCH/tensorboard/TIME`."""
    return scratch / "tensorboard" / time.strftime("%Y%m%d-%H%M%S")


class TensorBoard:
    """A listener for training events that writes event files while the context lasts.

    Below `directory`, each expert has a directory with `loss/train`, `loss/heldout`, `tokens` and
    `tokens_per_second` over its optimiser steps; `all` has `experts/done`, `experts/failed` and
    `tokens_per_second` over the seconds of the run. A file that cannot be written ends the
    writing, with a line on stderr, and not the training.

    Args:
        directory: of this run alone; made with the first event.
        clock: seconds from any start, to count intervals by.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._state = TrainingState(clock)
        self._pending: defaultdict[str, list[bytes]] = defaultdict(list)
        """Encoded points of each run that are not on disk yet."""
        self._files: dict[str, Path] = {}
        self._written = clock()
        self._broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write()

    def __call__(self, event: TrainEvent) -> None:
        """Take the points out of an event."""
        if self._broken:
            return
        self._state(event)
        match event:
            case ExpertProgress():
                self._add(
                    event.id,
                    event.step,
                    {
                        "loss/train": event.loss,
                        "tokens": event.tokens,
                        "tokens_per_second": event.tokens_per_second,
                    },
                )
            case ExpertMeasured():
                self._add(event.id, event.step, {"loss/heldout": event.loss})
            case ExpertFinished():
                self._finish(event)
            case ExpertFailed() | JobFinished() | PoolEnded():
                self._add_all()
        if self._clock() - self._written >= WRITE_S:
            self._add_all()
            self._write()

    def _finish(self, event: ExpertFinished) -> None:
        points: dict[str, float] = {"tokens": event.card.tokens_seen}
        if event.card.heldout_loss_expert is not None:
            points["loss/heldout"] = event.card.heldout_loss_expert
        self._add(event.id, event.card.steps, points)
        self._add_all()

    def _add_all(self) -> None:
        counts = self._state.counts
        points = {
            "experts/done": counts.done + counts.reused,
            "experts/failed": counts.failed,
            "tokens_per_second": self._state.tokens_per_second,
        }
        self._add(ALL, round(self._state.seconds), points)

    def _add(self, run: str, step: int, points: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._pending[run].append(_framed(event))

    def _write(self) -> None:
        self._written = self._clock()
        try:
            for run, records in self._pending.items():
                with self._file(run).open("ab") as file:
                    file.write(b"".join(records))
        except OSError as error:
            self._broken = True
            note(f"  no more event files for TensorBoard: {error}")
        self._pending.clear()

    def _file(self, run: str) -> Path:
        """A run's file, begun where it is not there yet."""
        from tensorboardX.proto.event_pb2 import Event

        if run not in self._files:
            now = time.time()
            # the names of measuring jobs have spaces in them
            folder = self._directory / run.replace(" ", "-").replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"events.out.tfevents.{int(now)}.{socket.gethostname()}"
            with path.open("ab") as file:
                file.write(_framed(Event(wall_time=now, file_version=FILE_VERSION)))
            self._files[run] = path
        return self._files[run]


def _framed(event: Any) -> bytes:
    """A record of TensorFlow's TFRecord format: length, its CRC, the event, its CRC.

    tensorboardX has this in a writer that keeps its file open.
    """
    from tensorboardX.record_writer import masked_crc32c

    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(
        [
            length,
            struct.pack("<I", masked_crc32c(length)),
            data,
            struct.pack("<I", masked_crc32c(data)),
        ]
    )
