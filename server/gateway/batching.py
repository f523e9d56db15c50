"""Micro-batching: calls that wait at the same moment are computed together.

What takes long is computed off the event loop: while a batch is, the next one gathers. A lone call
goes at once; several wait for company as long as the event loop brings any. What takes no time to
speak of is computed on the loop, for the calls of one turn together.
Knows nothing of what is computed.
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


Calls = Sequence[tuple[Sequence[Item], asyncio.Future[Sequence[Result]]]]
"""What each call asks and where it waits for it."""


class TurnBatcher(Generic[Item, Result]):
    """Computes on the event loop, together, what the calls of one turn of it ask.

    Many tasks that each compute a little between other things empty the processor's caches for each
    other.

    Args:
        compute: gives one result per item, in order, in a fraction of a millisecond.
        limit: items of a batch, at the most; a full one is computed before the end of the turn.
    """

    def __init__(self, compute: Callable[[Sequence[Item]], Sequence[Result]], limit: int) -> None:
        self._compute = compute
        self._limit = limit
        self._waiting: list[tuple[Sequence[Item], asyncio.Future[Sequence[Result]]]] = []
        self._items = 0

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Results of these items; others have their turn between `limit` of them and the next.

        An error of the batch is raised by every call in it.
        """
        results: list[Result] = []
        for start in range(0, len(items), self._limit):
            if start:
                await asyncio.sleep(0)
            results += await self._asked(items[start : start + self._limit])
        return results

    def _asked(self, items: Sequence[Item]) -> asyncio.Future[Sequence[Result]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[Result]] = loop.create_future()
        if self._items + len(items) > self._limit:
            self._run()
        if not self._waiting:
            loop.call_soon(self._run)
        self._waiting.append((items, future))
        self._items += len(items)
        if self._items >= self._limit:
            self._run()
        return future

    def _run(self) -> None:
        """Compute what waits; nothing, where a full batch was ahead of the end of the turn."""
        batch = [(items, future) for items, future in self._waiting if not future.cancelled()]
        self._waiting, self._items = [], 0
        if batch:
            try:
                results = self._compute([item for items, _ in batch for item in items])
            except Exception as error:  # noqa: BLE001 - it belongs to the callers
                _fail(batch, error)
            else:
                _hand_out(batch, results)


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
                    _fail(batch, error)
                else:
                    _hand_out(batch, results)
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


def _fail(batch: Calls[Item, Result], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)


def _hand_out(batch: Calls[Item, Result], results: Sequence[Result]) -> None:
    at = 0
    for items, future in batch:
        if not future.done():  # a caller that was cancelled wants nothing any more
            future.set_result(results[at : at + len(items)])
        at += len(items)
