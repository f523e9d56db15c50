"""What a person watches while experts train: one live view on stderr, or a readable log.

Where stderr is a terminal, the view stays at its bottom and failures scroll by above it. Where it
is not, there is a line for each expert that ends and now and then a line about all of them.
Knows how to keep a terminal in order; what it shows comes from `deploy.training_screen`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from deploy import training_words as words
from deploy.output import note, results
from deploy.training_screen import draw
from deploy.training_state import TrainingState
from expert_trainer.types import (
    ActorLost,
    ExpertFailed,
    ExpertFinished,
    PoolEnded,
    PoolStarted,
    TrainEvent,
)

DRAWINGS_PER_SECOND = 2
SUMMARY_S = 10.0
"""Least seconds between two summaries in a log."""


class TrainingView:
    """A listener for training events, shown while the context lasts.

    Args:
        title: what is being done, the view's first word.
        console: where to draw; default: stderr.
        clock: seconds from any start.
    """

    def __init__(
        self,
        title: str = "training",
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # rich takes a file for a terminal where FORCE_COLOR is set; no log wants a view drawn in it
        self._is_terminal = console.is_terminal if console else sys.stderr.isatty()
        self._console = console or Console(stderr=True)
        self._clock = clock
        self.state = TrainingState(clock)
        self._title = title
        self._lock = threading.Lock()
        """Between the events and the thread that draws. Never held while something is printed:
        the drawing thread holds the terminal when it comes to wait for this one."""
        self._live: Live | None = None
        self._told = 0.0
        self._reused_told = 0

    def __enter__(self) -> Self:
        if self._is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._draw,
                console=self._console,
                refresh_per_second=DRAWINGS_PER_SECOND,
                transient=True,
                # results that go to a file or a pipe must go there, view or not
                redirect_stdout=results().isatty(),
            )
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
        self._tell_reused()

    def __call__(self, event: TrainEvent) -> None:
        """Take note of an event and show what it changes."""
        line = self._line(event)
        with self._lock:
            self.state(event)
        if isinstance(event, PoolStarted):
            self._tell_reused()
        if line:
            self._print(line, alarming=isinstance(event, ExpertFailed | ActorLost))
        if not self._live:
            self._summarise(event)

    def _draw(self) -> RenderableType:
        """The screen as it is now; called by the drawing thread."""
        size = self._console.size
        with self._lock:
            return draw(self.state, self._title, width=size.width, height=size.height)

    def _line(self, event: TrainEvent) -> str | None:
        """What is worth a line of its own; looks at the state as it is before the event."""
        match event:
            case ExpertFailed():
                member = self.state.training.get(event.id)
                return words.failed(event, member.actor if member else None)
            case ActorLost():
                actor = self.state.actors.get(event.actor)
                return words.lost(event, actor.node if actor else None)
            case ExpertFinished() if not self._live:
                return words.finished(event.card)
            case PoolStarted() if not self._live and event.queued:
                actors = f"{event.actors} {'actor' if event.actors == 1 else 'actors'}"
                return f"{event.queued:,} to do on {actors} …"
        return None

    def _print(self, line: str, *, alarming: bool = False) -> None:
        if self._live:
            style = "yellow" if alarming else ""
            self._console.print(Text(line, style=style), soft_wrap=True)
        else:
            note(f"  {line}")

    def _tell_reused(self) -> None:
        """One line for all experts of earlier runs: there may be thousands."""
        reused = len(self.state.reused)
        if reused > self._reused_told:
            self._reused_told = reused
            self._print(
                f"{reused:,} finished in an earlier run {'is' if reused == 1 else 'are'} reused"
            )

    def _summarise(self, event: TrainEvent) -> None:
        now = self._clock()
        if isinstance(event, PoolStarted):
            self._told = now
        elif self.state.pool and (isinstance(event, PoolEnded) or now - self._told >= SUMMARY_S):
            self._told = now
            note(f"  {words.summary(self.state)}")
