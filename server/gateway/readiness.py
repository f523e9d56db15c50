"""Whether this gateway can answer, and what is missing: pure functions of the table.

Ready means that a ready worker generated a token with the expert (`server.table`); nothing here
calls anything ready for a lesser reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.table import RoutingTable


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a table can be served now."""

    experts_total: int
    missing: tuple[str, ...]
    """Served names of the experts that no ready worker holds."""
    refused: frozenset[str]
    """Those of the missing that every home refused, so that waiting for them is in vain."""
    workers_total: int
    workers_ready: int

    @property
    def experts_ready(self) -> int:
        """Experts that a ready worker holds."""
        return self.experts_total - len(self.missing)

    @property
    def complete(self) -> bool:
        """Whether every placed expert can answer that has not been refused."""
        return self.workers_ready > 0 and self.refused.issuperset(self.missing)


NOTHING = Coverage(
    experts_total=0, missing=(), refused=frozenset(), workers_total=0, workers_ready=0
)
"""Coverage before the first table."""


def coverage(table: RoutingTable) -> Coverage:
    """How much of a table can be served."""
    ready = [worker for worker in table.workers if worker.state == "ready"]
    held = {name for worker in ready for name in worker.experts}
    return Coverage(
        experts_total=len(table.experts),
        missing=tuple(e.served_name for e in table.experts if e.served_name not in held),
        refused=frozenset(table.refused_experts()),
        workers_total=len(table.workers),
        workers_ready=len(ready),
    )


class Readiness:
    """Coverage of the current table, and whether there ever was a complete one.

    Start-up waits for everything; after that a lost worker degrades the service and does not take
    the whole gateway out of rotation.
    """

    def __init__(self) -> None:
        self.coverage = NOTHING
        self.was_complete = False

    def update(self, table: RoutingTable) -> None:
        """Take a new table into account."""
        self.coverage = coverage(table)
        self.was_complete = self.was_complete or self.coverage.complete

    @property
    def degraded(self) -> bool:
        """Whether something that was served, or should be, cannot answer now."""
        missing_workers = self.coverage.workers_ready < self.coverage.workers_total
        return missing_workers or bool(self.coverage.missing) or not self.coverage.complete
