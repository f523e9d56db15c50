"""The client's side of a request: its body, and for how long it is worth going on.

Knows nothing of what the body says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from starlette.types import Receive

from server.gateway.errors import BodyTooLargeError, RequestTimeoutError
from server.gateway.hang_up import Watchers

CLIENT_GONE = 499
"""Status under which a request is counted whose client hung up."""

End = Literal["", "gone", "deadline", "stalled"]
"""Why a request was cut short: its client hung up, its time is over, or its client does not take
its answer."""


class ClientGoneError(Exception):
    """The client hung up before it had its answer; there is nobody to tell."""


async def read_body(
    receive: Receive, content_length: int | None, limit: int, timeout_s: float | None = None
) -> bytes:
    """The whole body.

    Raises:
        BodyTooLargeError: it is over `limit` bytes, as announced or as counted.
        RequestTimeoutError: it has not come within `timeout_s` seconds.
        ClientGoneError: the client hung up.
    """
    if content_length is not None and content_length > limit:
        raise _too_large(limit)
    if timeout_s is None:
        return await _read(receive, limit)
    task = asyncio.current_task()
    assert task is not None
    # A timer of one's own: `asyncio.timeout` costs each request three times as much.
    late = False

    def cut() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(timeout_s, cut)
    try:
        return await _read(receive, limit)
    except asyncio.CancelledError:
        if not late:
            raise
        task.uncancel()
        raise RequestTimeoutError(
            f"The request was not complete after {timeout_s:g} s. Send it faster, or have "
            "'gateway.client_timeout_s' raised."
        ) from None
    finally:
        timer.cancel()


async def _read(receive: Receive, limit: int) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        return body
    chunks = []
    size = 0
    while message["type"] != "http.disconnect":
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body"):
            return b"".join(chunks)
        message = await receive()
    raise ClientGoneError


class Lifeline:
    """Cancels a task when its client hangs up, its time is over, or its answer is not taken.

    Args:
        watchers: of the client's connection (`server.gateway.hang_up`).
        task: what is cancelled, until `stop`.
    """

    __slots__ = (
        "_deadline",
        "_loop",
        "_stall",
        "_stall_s",
        "_task",
        "_watchers",
        "end",
        "sending",
    )

    def __init__(self, watchers: Watchers, task: asyncio.Task[Any]) -> None:
        self.end: End = ""
        """Why the task was cancelled; empty as long as it was not, or by somebody else."""
        self.sending = 0.0
        """Since when a part of the answer waits to be taken; 0: none does."""
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._stall_s = 0.0
        self._watchers = watchers
        watchers.add(self._gone)

    @property
    def clock(self) -> Callable[[], float]:
        """The clock of `sending`."""
        return self._loop.time

    def limit(self, seconds: float) -> None:
        """Give the task so long, until `unlimit`."""
        self._deadline = self._loop.call_later(seconds, self._cut, "deadline")

    def unlimit(self) -> None:
        """The first byte of the answer is there: it may take its time from here on."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def guard_sending(self, seconds: float) -> None:
        """Give the client so long to take each part of the answer."""
        self._stall_s = seconds
        self._stall = self._loop.call_later(seconds, self._check_sending)

    def stop(self) -> None:
        """Stop watching; the task is not cancelled from here on."""
        self._watchers.discard(self._gone)
        self.unlimit()
        if self._stall is not None:
            self._stall.cancel()

    def _check_sending(self) -> None:
        waited = self._loop.time() - self.sending if self.sending else 0.0
        if waited >= self._stall_s:
            self._cut("stalled")
        else:
            self._stall = self._loop.call_later(self._stall_s - waited, self._check_sending)

    def _cut(self, end: End) -> None:
        if not self.end:
            self.end = end
            self._task.cancel()

    def _gone(self) -> None:
        self._cut("gone")


def abort_connection(receive: Receive) -> None:
    """Drop the client's connection with all that waits to be taken from it.

    A server that closes it in an orderly way waits for a client that takes nothing. ASGI has no
    word for this; uvicorn's `receive` is a method of the object that has the transport.
    """
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"The body is larger than the limit of {limit} bytes. Send a shorter one, or have "
        "'gateway.max_body_bytes' raised."
    )
