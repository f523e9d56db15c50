"""What a person watches while a batch is answered: a bar on stderr, or a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deploy.output import note

if TYPE_CHECKING:
    from server.batch.types import Counts

EXPERTS = 8
"""Experts that are shown, those with the most lines left."""
LOG_S = 10.0
WORDS = {
    "reading": "reading and routing",
    "starting": "waiting for engines",
    "answering": "answering",
    "writing": "writing",
    "done": "done",
}


class BatchView:
    """Shows `Counts` as they come; pass the object itself as the listener."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = (
            Live(console=console, transient=True, auto_refresh=False)
            if sys.stderr.isatty()
            else None
        )
        self._phase = ""
        self._logged = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, counts: Counts) -> None:
        """Show where the job stands."""
        if self._live:
            self._live.update(_screen(counts), refresh=True)
            return
        now = time.monotonic()
        if counts.phase != self._phase or now - self._logged >= LOG_S:
            self._phase, self._logged = counts.phase, now
            note(f"  {words(counts)}")


def words(counts: Counts) -> str:
    """One line that says where a job stands."""
    over = counts.done + counts.failed
    text = WORDS[counts.phase]
    if counts.phase == "reading":
        return f"{text}: {counts.total:,} lines{_rate(counts.total, counts)}"
    text += f": {over:,} of {counts.total:,} lines"
    if counts.failed:
        text += f", {counts.failed:,} errors"
    seconds = counts.seconds.get("answering", 0.0)
    now = over - counts.finished_before
    if counts.phase == "answering" and seconds > 1 and now > 0:
        left = (counts.total - over) * seconds / now
        text += f", {now / seconds:.1f} lines/s, {counts.tokens / seconds:,.0f} tokens/s, "
        text += f"{_clock(left)} left"
    return text


def _rate(lines: int, counts: Counts) -> str:
    seconds = counts.seconds.get("reading", 0.0)
    return f", {lines / seconds:,.0f} lines/s" if seconds > 1 else ""


def _screen(counts: Counts) -> Group:
    over = counts.done + counts.failed
    rows = Table.grid(padding=(0, 2))
    left = sorted(counts.experts.items(), key=lambda kv: kv[1][0] - kv[1][1])
    for expert, (done, total) in left[:EXPERTS]:
        rows.add_row(
            Text(f"  {expert}"),
            ProgressBar(total=max(total, 1), completed=done, width=24),
            Text(f"{done:,}/{total:,}"),
        )
    if len(left) > EXPERTS:
        rows.add_row(Text(f"  and {len(left) - EXPERTS} more"))
    bar = ProgressBar(total=max(counts.total, 1), completed=over, width=48)
    return Group(Text(f"  {words(counts)}"), bar, rows)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
