"""Adapters copied into an engine's slot while the requests that need them still wait.

As soon as it is known that a request has to wait for one of a worker's slots, the expert that is
let in next is copied into the slot that the engine has to spare. One at a time: who comes after it
is looked for once that one has been let in, or waits no longer. Knows nothing of how requests are
ordered; what cannot be copied ahead is copied by the engine when it is needed.
"""

from __future__ import annotations

import asyncio
import json
import logging

from multidict import CIMultiDict

from server.engine_slots import FILL_PATH
from server.gateway.errors import GatewayError
from server.gateway.metrics import Metrics
from server.gateway.residency import Residency
from server.gateway.upstream import UnreachableError, Upstream
from server.gateway.views import Home

logger = logging.getLogger(__name__)

PAUSE_S = 0.1
"""Seconds after a copy, or after a request was let in, before the engine has to make another copy.
One holds up all that the engine answers: those who were let in should have begun by then, and
clients that wait and hang up by turns could have it do nothing else."""
FAILED_PAUSE_S = 10.0
"""Likewise after a copy that could not be made."""

HEADERS = CIMultiDict({"content-type": "application/json"})


class Prefetch:
    """What this process has engines copy ahead."""

    def __init__(
        self,
        upstream: Upstream,
        metrics: Metrics,
        pause_s: float = PAUSE_S,
        failed_pause_s: float = FAILED_PAUSE_S,
    ) -> None:
        """Nothing is on its way."""
        self._upstream = upstream
        self._metrics = metrics
        self._pause_s = pause_s
        self._failed_pause_s = failed_pause_s
        self._tasks: set[asyncio.Task[None]] = set()

    def consider(self, home: Home) -> None:
        """Somebody has begun to wait in a worker's lane, or waits no longer: have the expert copied
        that is let in next, unless it lies in a slot or the engine is to be left in peace."""
        residency, lane = home.residency, home.lane
        if residency is None or residency.resting:
            return
        expert = lane.upcoming()
        if expert is None:
            return
        # Those that run are used at every step, and those just let in are about to be: the copy
        # must drive out none of them, nor does their adapter leave its slot.
        running = lane.in_slots()
        for name in running:
            residency.touch(name)
        if expert in residency:
            return
        residency.touch(expert)
        residency.resting = True
        task = asyncio.create_task(self._fill(home, residency, [*running, expert]))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def entered(self, home: Home) -> None:
        """Somebody who waited has been let in: look for the next one in a while."""
        residency = home.residency
        if residency is not None and not residency.resting:
            self._rest(home, residency, self._pause_s)

    def _rest(self, home: Home, residency: Residency, seconds: float) -> None:
        def look_again() -> None:
            residency.resting = False
            self.consider(home)

        residency.resting = True
        asyncio.get_running_loop().call_later(seconds, look_again)

    async def _fill(self, home: Home, residency: Residency, names: list[str]) -> None:
        expert, pause_s = names[-1], self._failed_pause_s
        try:
            fault = await self._ask(home, names)
            if fault is None:
                self._metrics.prefetched(home.worker)
                pause_s = self._pause_s
                return
            if home.lane.waits_outside(expert):  # else it has been used meanwhile
                residency.forget(expert)
            logger.info("%s: %s is not copied ahead: %s", home.worker, expert, fault)
        finally:
            self._rest(home, residency, pause_s)

    async def _ask(self, home: Home, names: list[str]) -> str | None:
        """Have an engine use adapters in this order; why it did not, if so."""
        body = json.dumps({"lora_names": names}).encode()
        try:
            answer = await self._upstream.post(home.url, FILL_PATH, body, HEADERS)
            try:
                told = await self._upstream.whole(answer)
            finally:
                answer.close()
        except (UnreachableError, GatewayError) as error:
            return str(error)
        if answer.status == 200:
            return None
        return f"{answer.status} {told[:300].decode(errors='replace')}"
