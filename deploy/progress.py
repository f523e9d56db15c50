"""What a person watches while something is done in stages: live bars on stderr.

Where stderr is no terminal, a line per stage takes their place. The view over experts in training
is `deploy.training_view`.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deploy.output import note, results


class StageBar:
    """Bars for stages reported as (stage, done, total); pass the object itself as the callback.

    They are shown while the context lasts.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._bars = _progress()
        self._tasks: dict[str, TaskID] = {}
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show a stage's progress."""
        if not self._live:
            if stage not in self._told:
                self._told.add(stage)
                note(f"  {stage} …")
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, detail="")
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def detail(self, stage: str, text: str) -> None:
        """A few words behind a stage's bar."""
        if stage in self._tasks:
            self._bars.update(self._tasks[stage], detail=text)


def _progress() -> Progress:
    return Progress(
        TextColumn("  {task.description:<14}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        # results that go to a file or a pipe must go there, bars or not
        redirect_stdout=results().isatty(),
    )
