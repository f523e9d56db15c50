"""One pool's books: what is done and left, how fast it goes, when it will end.

Pure: knows no clock, no event and no terminal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

WINDOW_S = 60.0
"""Seconds over which speeds are measured: long enough to span an expert's evaluations."""
SAMPLE_S = 1.0


@dataclass
class Training:
    """An expert, or another job's member, that an actor is at work on."""

    id: str
    actor: str
    attempt: int
    steps: int
    since: float
    """When the actor took it up, by the state's clock."""
    step: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    loss: float | None = None
    heldout: float | None = None

    @property
    def steps_left(self) -> int:
        """Steps to go, should it not stop early."""
        return max(self.steps - self.step, 0)

    @property
    def seconds_left(self) -> float | None:
        """Time to go at its own speed; none before it has reported."""
        if not self.step or not self.tokens_per_second:
            return None
        return self.steps_left * self.tokens / self.step / self.tokens_per_second


class Meter:
    """Tokens and steps per second over the last `WINDOW_S`."""

    def __init__(self, now: float) -> None:
        self._samples = deque([(now, 0, 0.0)])
        self._tokens = 0
        self._steps = 0.0

    def add(self, now: float, tokens: int, steps: float) -> None:
        """Count what was trained since the last call."""
        if now - self._samples[-1][0] >= SAMPLE_S:
            self._samples.append((now, self._tokens, self._steps))
        self._tokens += tokens
        self._steps += steps

    def rates(self, now: float) -> tuple[float, float]:
        """Tokens and steps per second."""
        while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()
        since, tokens, steps = self._samples[0]
        seconds = max(now - since, SAMPLE_S)
        return (self._tokens - tokens) / seconds, (self._steps - steps) / seconds


@dataclass
class Pool:
    """One pool's books."""

    queued: int
    actors: int
    steps: int
    """Of all its jobs; 0: not known."""
    meter: Meter
    started: dict[str, int] = field(default_factory=dict)
    """Steps of every member that was ever taken up."""
    again: set[str] = field(default_factory=set)
    """Members that wait to be tried again."""
    saved: int = 0
    """Steps that finished experts did not need, because they stopped early."""
    done: int = 0
    failed: int = 0
    ended: bool = False

    def share_done(self, running: Collection[Training]) -> float:
        """Share of the steps that are behind it, from 0 to 1."""
        behind = sum(self.started.values()) - self._left_of_started(running)
        return behind / (behind + self.steps_left(running)) if behind else 0.0

    def seconds_left(self, running: Collection[Training], now: float) -> float | None:
        """Time to its end; none before its speed is known.

        At the speed of the last minute for all steps that are left, and no less than the slowest
        expert in training needs by itself: at the end most actors have nothing to do.
        """
        speed = self.meter.rates(now)[1]
        if not speed:
            return None
        alone = [member.seconds_left or 0.0 for member in running]
        return max([self.steps_left(running) / speed, *alone])

    def steps_left(self, running: Collection[Training]) -> float:
        """Steps to go; queued experts are taken to save what those before them saved.

        Experts come longest first: of those not yet begun, none is longer than the last one begun.
        """
        begun = sum(self.started.values())
        if self.steps:
            ahead = self.steps - begun
        else:
            longest = next(reversed(self.started.values()), 0)
            ahead = (self.queued - len(self.started)) * longest
        needed = 1 - self.saved / begun if begun else 1.0
        return self._left_of_started(running) + max(ahead, 0) * needed

    def _left_of_started(self, running: Collection[Training]) -> int:
        again = sum(self.started[expert] for expert in self.again & self.started.keys())
        return sum(member.steps_left for member in running) + again
