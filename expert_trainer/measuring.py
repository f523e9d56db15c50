"""Losses of documents under one adapter or under the base alone, as a job for a training actor.

Knows nothing of what the losses are compared for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from expert_trainer.hashed import HashedDirectory
from expert_trainer.job import JobItem, Outcome
from expert_trainer.shards import Shard
from expert_trainer.types import Example

if TYPE_CHECKING:
    from expert_trainer.workbench import Workbench


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a directory that may be behind a URL."""

    files: HashedDirectory
    copy: Path
    """Where its copy goes on the machine of whoever needs it, unless it is local."""


@dataclass(frozen=True)
class MeasureJob:
    """The only member is the job itself."""

    id: str
    adapter: SavedAdapter | None
    """None: the base alone."""
    documents: Shard
    sequence_length: int
    batch_rows: int

    @property
    def members(self) -> tuple[str, ...]:
        """Name in events."""
        return (self.id,)

    @property
    def steps(self) -> int:
        """One: all such jobs take the same time."""
        return 1

    def steps_of(self, member: str) -> int:
        """As `steps`."""
        return self.steps

    def only(self, members: Sequence[str]) -> MeasureJob:
        """The job itself, which has no part that could be left out."""
        assert tuple(members) == self.members, "it has one member"
        return self

    def read(self, bench: Workbench) -> tuple[list[Example], Path | None]:
        """The documents as tokens, and the adapter's directory on this machine."""
        adapter = self.adapter.files.fetch(self.adapter.copy) if self.adapter else None
        return bench.examples((self.documents,)), adapter

    def run(self, bench: Workbench, data: tuple[list[Example], Path | None]) -> Iterator[JobItem]:
        """Measure; the outcome is a float64 array `[documents, 2]` of nats and tokens."""
        from expert_trainer.measure import document_losses

        examples, directory = data
        if directory is not None:
            bench.adapter.load(0, directory)
        with bench.computing, bench.adapter.using([] if directory is None else [0]):
            losses = document_losses(bench.model, examples, self.sequence_length, self.batch_rows)
        yield Outcome(self.id, losses)
