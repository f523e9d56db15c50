"""The metrics of all gateway processes, whichever of them is asked.

What has been told is never taken back, for a sum that falls looks like a restart of everything to
Prometheus: a process writes down what it tells before it tells it, and the one that takes its
place after its death goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import msgspec

from server.gateway.metrics import Metrics
from server.gateway.seat import Seat
from server.gateway.tallies import Snapshot, exposition, merged
from server.gateway_reports import ask_all
from server.table import GATEWAY_SOCKET

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics-{}.json"
"""In the run directory: what each process told last."""


class Scrape:
    """Reads the metrics of one process, and of all."""

    def __init__(self, metrics: Metrics, seat: Seat, path: str) -> None:
        """Go on from what the process of this number told before it died, if there was one.

        Args:
            metrics: this process' own.
            seat: its place among the others.
            path: where the others answer with theirs.
        """
        self._metrics, self._seat, self._path = metrics, seat, path
        self._writing = asyncio.Lock()
        before = self._written(seat.number)
        if before is not None:
            metrics.restore(before)

    async def own(self) -> bytes:
        """This process' metrics, for the others."""
        return await self._write(self._metrics.snapshot())

    async def all(self) -> bytes:
        """Everybody's metrics as one, in Prometheus' text format."""
        return await asyncio.to_thread(exposition, await self.added_up())

    async def added_up(self) -> list[Snapshot]:
        """Everybody's metrics as one."""
        own = self._metrics.snapshot()
        siblings = self._seat.siblings()
        if not siblings:
            return own
        answers, _ = await asyncio.gather(ask_all(siblings, self._path), self._write(own))
        return await asyncio.to_thread(self._with, own, answers)

    def _with(self, own: list[Snapshot], answers: dict[Path, bytes]) -> list[Snapshot]:
        everybody = [own]
        for number in range(self._seat.processes):
            if number == self._seat.number:
                continue
            assert self._seat.run_dir is not None
            body = answers.get(self._seat.run_dir / GATEWAY_SOCKET.format(number))
            if body is not None:
                everybody.append(msgspec.json.decode(body, type=list[Snapshot]))
            elif (last := self._written(number)) is not None:
                # dead or deaf: what it counted stands, what it is now is not known
                everybody.append([one for one in last if one.kind != "gauge"])
        return merged(everybody)

    async def _write(self, snapshots: list[Snapshot]) -> bytes:
        async with self._writing:
            return await asyncio.to_thread(self._write_down, snapshots)

    def _write_down(self, snapshots: list[Snapshot]) -> bytes:
        body = msgspec.json.encode(snapshots)
        if self._seat.run_dir is not None:
            path = self._seat.run_dir / METRICS_FILE.format(self._seat.number)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                temporary.write_bytes(body)
                temporary.replace(path)
            except OSError as error:
                logger.warning("metrics cannot be written down: %s", error)
        return body

    def _written(self, number: int) -> list[Snapshot] | None:
        if self._seat.run_dir is None:
            return None
        path = self._seat.run_dir / METRICS_FILE.format(number)
        try:
            return msgspec.json.decode(path.read_bytes(), type=list[Snapshot])
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("%s cannot be read: %s", path.name, error)
            return None
