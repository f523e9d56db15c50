"""What the control process learns from the gateways, and the demand that follows from it.

Knows nothing of how they are asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol


class Report(Protocol):
    """What one gateway process tells of itself."""

    @property
    def process(self) -> int:
        """Its number."""

    @property
    def table_version(self) -> int:
        """Of the table in use."""

    @property
    def routers(self) -> Mapping[str, str]:
        """By bundle version: `ready`, or `loading`, `failed` or `mismatched` and why."""

    @property
    def in_flight_bundles(self) -> Mapping[str, int]:
        """Requests in flight by the bundle version that they began with."""

    @property
    def demand(self) -> Mapping[str, float]:
        """Engine seconds by expert id since the process started."""


Gather = Callable[[], Awaitable[Sequence[Report]]]
"""Asks all gateway processes; those that do not answer are left out."""


class DemandMeter:
    """Rates from counters that grow, and start at nothing when a process does."""

    def __init__(self) -> None:
        """Measure nothing yet."""
        self._counted: dict[int, Mapping[str, float]] = {}
        self._at: float | None = None

    def feed(self, reports: Sequence[Report], now: float) -> dict[str, float]:
        """Engine seconds per second since the last time, by expert id; empty the first time.

        Args:
            reports: of the processes that answer.
            now: seconds of a clock that only grows.
        """
        before, self._at = self._at, now
        rates: dict[str, float] = {}
        for report in reports:
            counted = self._counted.get(report.process, {})
            for expert, seconds in report.demand.items():
                grown = seconds - counted.get(expert, 0.0)
                if before is not None and now > before:
                    more = (grown if grown >= 0 else seconds) / (now - before)
                    rates[expert] = rates.get(expert, 0.0) + more
            self._counted[report.process] = dict(report.demand)
        return rates
