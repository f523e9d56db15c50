"""Adapters copied into an engine's slot while the requests that need them still wait.

As soon as it is known that a request has to wait for one of a worker's slots, the expert that is
let in next is copied into the slot that the engine has to spare. One at a time: another follows
once that one's requests are let in, or nobody waits for it any more. Knows nothing of how requests
are ordered; what cannot be copied ahead is copied by the engine when it is needed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math

from multidict import CIMultiDict

from server.engine_slots import FILL_PATH
from server.gateway.errors import GatewayError
from server.gateway.metrics import Metrics
from server.gateway.residency import Residency
from server.gateway.upstream import UnreachableError, Upstream
from server.gateway.views import Home

logger = logging.getLogger(__name__)

PAUSE_S = 0.1
"""Seconds after a copy before this process has the same engine make another. A copy holds up all
that the engine answers, and clients that wait and hang up by turns could have it make nothing else;
what is not copied ahead meanwhile is copied when it is needed."""

HEADERS = CIMultiDict({"content-type": "application/json"})


class Prefetch:
    """What this process has engines copy ahead."""

    def __init__(self, upstream: Upstream, metrics: Metrics, pause_s: float = PAUSE_S) -> None:
        """Nothing is on its way."""
        self._pause_s = pause_s
        self._upstream = upstream
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def consider(self, home: Home, entering: str | None = None) -> None:
        """Have the expert copied that is let in next, unless one lies ready that is waited for.

        Args:
            home: whose lane a request has begun to wait in, or has been let in by.
            entering: served name of the expert whose request has been let in, and which the engine
                may not have seen yet: the copy must not drive that one out.
        """
        residency, lane = home.residency, home.lane
        if residency is None:
            return
        if residency.ahead is not None and lane.waits_outside(residency.ahead):
            return
        if asyncio.get_running_loop().time() < residency.undisturbed_until:
            return
        expert = lane.upcoming()
        residency.ahead = expert
        if expert is None or expert in residency:
            return
        names = [expert]
        if entering is not None:
            names.insert(0, entering)
            if entering in residency:  # else its request is the one that finds it in no slot
                residency.touch(entering)
        residency.touch(expert)
        residency.undisturbed_until = math.inf
        task = asyncio.create_task(self._fill(home, residency, names))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fill(self, home: Home, residency: Residency, names: list[str]) -> None:
        body = json.dumps({"lora_names": names}).encode()
        try:
            answer = await self._upstream.post(home.url, FILL_PATH, body, HEADERS)
            try:
                fault = await self._upstream.whole(answer)
            finally:
                answer.close()
            if answer.status == 200:
                self._metrics.prefetched(home.worker)
                return
            reason = f"{answer.status} {fault[:300].decode(errors='replace')}"
        except (UnreachableError, GatewayError) as error:
            reason = str(error)
        finally:
            residency.undisturbed_until = asyncio.get_running_loop().time() + self._pause_s
        residency.forget(names[-1])
        logger.info("%s: %s is not copied ahead: %s", home.worker, names[-1], reason)
