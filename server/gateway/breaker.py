"""Leaving a worker alone that keeps failing, and finding out when it is back.

A breaker (Nygard, Release It!, 2007) is closed while all is well, open for a pause after too many
failures in a row, and then half-open: one request is let through, which closes it or opens it for
twice as long. It knows no request and no clock but the one that it is handed. What counts as a
failure is that there was no answer; an answer of any status comes from an engine that lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

MAX_PAUSE_S = 30.0
"""Longest pause between two trials of a worker."""

BreakerState = Literal["closed", "open", "half-open"]
Named = TypeVar("Named")


class Breaker:
    """One worker's failures, and when it may be tried again."""

    __slots__ = ("_failures", "_limit", "_pause_s", "_shortest_s", "open_until", "opened", "trial")

    def __init__(self, failures: int, pause_s: float) -> None:
        self._limit = failures
        self._shortest_s = pause_s
        self._pause_s = pause_s
        self._failures = 0
        self.opened = False
        self.open_until = 0.0
        """Moment of the next trial; means nothing while it is closed."""
        self.trial = False
        """Whether the one request is on its way that a half-open breaker lets through."""

    def state(self, now: float) -> BreakerState:
        """What it is at a moment."""
        if not self.opened:
            return "closed"
        return "open" if now < self.open_until else "half-open"

    def allows(self, now: float) -> bool:
        """Whether a request may go to the worker."""
        return not self.opened or (now >= self.open_until and not self.trial)

    def began(self, now: float) -> bool:
        """A request goes to the worker; whether it is the trial of a half-open breaker."""
        trial = self.state(now) == "half-open" and not self.trial
        self.trial = self.trial or trial
        return trial

    def failed(self, now: float, *, for_certain: bool = False) -> bool:
        """A request got no answer; whether that opened the breaker, or kept it open.

        Args:
            now: the moment, in seconds.
            for_certain: it is known that no other will get one either.
        """
        if self.opened:
            if not self.trial:
                return False  # it had begun before, or was tried for want of another
            self.trial = False
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            self.open_until = now + self._pause_s
            return True
        self._failures += 1
        if self._failures < self._limit and not for_certain:
            return False
        self.opened = True
        self.open_until = now + self._pause_s
        return True

    def answered(self) -> bool:
        """An answer has begun: the worker may be asked, but one more failure is one too many.
        Whether it was left alone until now."""
        if not self.opened:
            return False
        self.opened = False
        self.trial = False
        self._failures = self._limit - 1
        return True

    def succeeded(self) -> None:
        """A whole answer has come: all is forgotten."""
        self.opened = False
        self.trial = False
        self._failures = 0
        self._pause_s = self._shortest_s

    def abandoned(self) -> None:
        """The trial ended and told nothing: the next request is one."""
        self.trial = False


class Breakers:
    """The breakers of those workers that have failed lately; of all others there is none."""

    def __init__(self, failures: int, pause_s: float, clock: Callable[[], float]) -> None:
        self._failures = failures
        self._pause_s = pause_s
        self._clock = clock
        self.troubled: dict[str, Breaker] = {}
        """By worker. Empty while all is well, which is what a request looks at first."""

    def allows(self, worker: str) -> bool:
        """Whether a request may go to a worker."""
        breaker = self.troubled.get(worker)
        return breaker is None or breaker.allows(self._clock())

    def state(self, worker: str) -> BreakerState:
        """State of a worker's breaker."""
        breaker = self.troubled.get(worker)
        return "closed" if breaker is None else breaker.state(self._clock())

    def least_bad(self, candidates: Iterable[Named], worker: Callable[[Named], str]) -> Named:
        """Of candidates that are all left alone, the one whose trial comes next."""
        return min(candidates, key=lambda one: self._next_trial(worker(one)))

    def began(self, worker: str) -> bool:
        """A request goes to a worker; whether it is a trial."""
        breaker = self.troubled.get(worker)
        return breaker is not None and breaker.began(self._clock())

    def failed(self, worker: str, *, for_certain: bool = False) -> bool:
        """A worker gave no answer, or `for_certain` none will come; whether it is left alone from
        now on."""
        breaker = self.troubled.get(worker)
        if breaker is None:
            breaker = self.troubled[worker] = Breaker(self._failures, self._pause_s)
        return breaker.failed(self._clock(), for_certain=for_certain)

    def answered(self, worker: str) -> bool:
        """A worker's answer has begun; whether it was left alone until now."""
        breaker = self.troubled.get(worker)
        return breaker is not None and breaker.answered()

    def succeeded(self, worker: str) -> None:
        """A worker's answer has come to its end."""
        self.troubled.pop(worker, None)

    def abandoned(self, worker: str) -> None:
        """A trial of a worker ended and told nothing."""
        if breaker := self.troubled.get(worker):
            breaker.abandoned()

    def forget(self, worker: str) -> None:
        """The worker is another one now: it has a new engine, or is gone."""
        self.troubled.pop(worker, None)

    def _next_trial(self, worker: str) -> float:
        breaker = self.troubled.get(worker)
        return breaker.open_until if breaker is not None and breaker.opened else 0.0
