"""How many requests are in flight on each worker.

One process counts for itself; `server.gateway.shared` counts over all gateway processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol


class Counts(Protocol):
    """Requests in flight by name: of a worker, or whatever else is counted."""

    def add(self, name: str, change: int) -> None:
        """One more (1) or one less (-1)."""
        ...

    def of(self, name: str) -> int:
        """How many there are, in all gateway processes."""
        ...

    def own(self) -> Mapping[str, int]:
        """How many this process has, by name; names with none may be missing."""
        ...


class LocalCounts:
    """Counts of one process."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, change: int) -> None:
        """One more or one less."""
        self._counts[name] += change
        if not self._counts[name]:
            del self._counts[name]

    def of(self, name: str) -> int:
        """How many there are."""
        return self._counts.get(name, 0)

    def own(self) -> Mapping[str, int]:
        """All of them."""
        return self._counts
