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

    def __init__(self, half_life_s: float) -> None:
        """Measure nothing yet.

        Args:
            half_life_s: after which a rate counts half.
        """
        self._half_life_s = half_life_s
        self._counted: dict[int, Mapping[str, float]] = {}
        self._rates: dict[str, float] = {}
        self._at: float | None = None

    def feed(self, reports: Sequence[Report], now: float) -> dict[str, float]:
        """Rates by expert id, engine seconds per second, with these reports."""
        if self._at is None:
            self._at = now
            self._counted = {report.process: dict(report.demand) for report in reports}
            return {}
        elapsed = now - self._at
        if elapsed <= 0:
            return dict(self._rates)
        grown: dict[str, float] = {}
        for report in reports:
            before = self._counted.get(report.process, {})
            for expert, seconds in report.demand.items():
                since = seconds - before.get(expert, 0.0)
                grown[expert] = grown.get(expert, 0.0) + (since if since >= 0 else seconds)
            self._counted[report.process] = dict(report.demand)
        kept = 0.5 ** (elapsed / self._half_life_s)
        self._rates = {
            expert: kept * self._rates.get(expert, 0.0)
            + (1 - kept) * grown.get(expert, 0.0) / elapsed
            for expert in self._rates.keys() | grown.keys()
        }
        self._at = now
        return dict(self._rates)
