"""Where routing tables come from: a file that the control plane replaces by rename.

A table that cannot be read is reported once and the one before it stays, for ever if need be. This
module knows nothing of what a table is used for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from server.table import RoutingTable, read_table, table_identity

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.1


class TableSource(Protocol):
    """Whatever hands out routing tables."""

    def follow(self) -> AsyncIterator[RoutingTable]:
        """Each new table, from the current one on; ends only when it is cancelled."""
        ...


class TableFile:
    """The table file of `server.table`, looked at ten times a second."""

    def __init__(self, path: Path, *, interval_s: float = LOOK_INTERVAL_S) -> None:
        self._path = path
        self._interval_s = interval_s
        self._seen: tuple[int, int, int] | None = None
        self._unreadable = False

    async def follow(self) -> AsyncIterator[RoutingTable]:
        """Each new table of the file, the one that is there first."""
        while True:
            table = await asyncio.to_thread(self._read_if_new)
            if table is not None:
                yield table
            await asyncio.sleep(self._interval_s)

    def _read_if_new(self) -> RoutingTable | None:
        try:
            identity = table_identity(self._path)
            if identity == self._seen:
                return None
            table = read_table(self._path)
        except FileNotFoundError:
            return None
        except OSError as error:  # out of file descriptors, say: it may be read the next time
            if not self._unreadable:
                logger.error("the routing table cannot be read, the last one stays: %s", error)
            self._unreadable = True
            return None
        except ValueError as error:  # no UTF-8, or no table
            logger.error("the routing table cannot be read, the last one stays: %s", error)
            table = None
        self._seen, self._unreadable = identity, False
        return table
