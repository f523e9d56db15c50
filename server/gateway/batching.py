"""Micro-batching: calls that wait at the same moment are computed together, off the event loop.

While a batch is computed the next one gathers. A lone call goes at once; several wait for company
as long as the event loop brings any. Knows nothing of what is computed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

QUIET_TURNS = 10
"""Turns of the event loop without a new call after which several calls are computed; a lone one is
after one. Each change from the loop to the thread and back empties the processor's caches for both,
which on a full core costs more than a batch gains by leaving early; turns without work take
microseconds."""


class QueueFullError(Exception):
    """More calls wait already than may."""


class Batcher(Generic[Item, Result]):
    """Turns a function of many items into a coroutine of few.

    Args:
        compute: gives one result per item, in order; runs in `executor`.
        executor: one thread, so that at most one batch is computed at a time.
        limit: items of a batch, at the most; one call's items are never split.
        most_waiting: calls that may wait for a batch of theirs; more are refused at once, since
            they would only be late.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        executor: Executor,
        limit: int,
        most_waiting: int,
    ) -> None:
        self._compute = compute
        self._executor = executor
        self._limit = limit
        self._most_waiting = most_waiting
        self._waiting: deque[tuple[Sequence[Item], asyncio.Future[Sequence[Result]]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, items: Sequence[Item]) -> Sequence[Result]:
        """Results of these items. An error of the batch is raised by every call in it.

        Raises:
            QueueFullError: `most_waiting` calls wait already.
        """
        if len(self._waiting) >= self._most_waiting:
            raise QueueFullError
        future: asyncio.Future[Sequence[Result]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._gather()
                if not (batch := self._take()):
                    return
                items = [item for call, _ in batch for item in call]
                try:
                    results = await loop.run_in_executor(self._executor, self._compute, items)
                except Exception as error:  # noqa: BLE001 - it belongs to the callers
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                    continue
                at = 0
                for call, future in batch:
                    if not future.done():  # a caller that was cancelled wants nothing any more
                        future.set_result(results[at : at + len(call)])
                    at += len(call)
        finally:
            self._running = None

    async def _gather(self) -> None:
        """Give the event loop turns as long as they bring more calls, up to a whole batch."""
        known = quiet = 0
        while self._waiting and len(self._waiting) < self._limit:
            quiet = quiet + 1 if len(self._waiting) == known else 0
            known = len(self._waiting)
            if quiet >= (QUIET_TURNS if known > 1 else 1):
                return
            await asyncio.sleep(0)

    def _take(self) -> list[tuple[Sequence[Item], asyncio.Future[Sequence[Result]]]]:
        """What waits now, up to the limit, without the calls that were cancelled meanwhile."""
        batch: list[tuple[Sequence[Item], asyncio.Future[Sequence[Result]]]] = []
        size = 0
        while self._waiting and (not batch or size + len(self._waiting[0][0]) <= self._limit):
            call, future = self._waiting.popleft()
            if not future.cancelled():
                batch.append((call, future))
                size += len(call)
        return batch
