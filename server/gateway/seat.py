"""The place of one gateway process among those that share an endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.gateway.counts import Counts, LocalCounts
from server.gateway.shared import SharedCounts, SharedRates
from server.gateway.tenants import LocalRates, Rates
from server.table import GATEWAY_SOCKET

IN_FLIGHT_FILE = "in-flight.shm"
"""In the run directory: requests in flight, by worker, of all processes."""
TENANTS_FILE = "tenants.shm"
"""Requests running, by API key."""
RATES_FILE = "rates.shm"
"""What each API key has asked."""
COUNT_FILES = (IN_FLIGHT_FILE, TENANTS_FILE)


@dataclass(frozen=True, slots=True)
class Seat:
    """What the driver has given a process; alone, it has been given nothing."""

    run_dir: Path | None = None
    """Where the table, the sockets and what is shared lie; none: nothing is shared."""
    number: int = 0
    processes: int = 1
    engine_key: str | None = None
    """What engines ask for; shown to nobody."""
    again: bool = False
    """Whether it takes the place of a process that died: then its clients wait for it already."""
    admin_sha256: str | None = None
    """SHA-256 of the admin key that the driver made; none: as the config says."""

    def counts(self, file: str) -> Counts:
        """Counts over all processes."""
        if self.run_dir is None:
            return LocalCounts()
        return SharedCounts(self.run_dir / file, processes=self.processes, number=self.number)

    def rates(self) -> Rates:
        """Rates over all processes."""
        return SharedRates(self.run_dir / RATES_FILE) if self.run_dir else LocalRates()

    def siblings(self) -> list[Path]:
        """Sockets of the other processes, which may be dead."""
        if self.run_dir is None:
            return []
        return [
            self.run_dir / GATEWAY_SOCKET.format(number)
            for number in range(self.processes)
            if number != self.number
        ]
