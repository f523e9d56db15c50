"""The client's side of a request: its body, and whether it is still there.

Knows nothing of what the body says.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive

from server.gateway.errors import BodyTooLargeError

CLIENT_GONE = 499
"""Status under which a request is counted whose client hung up."""


class ClientGoneError(Exception):
    """The client hung up before it had its answer; there is nobody to tell."""


async def read_body(receive: Receive, content_length: int | None, limit: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLargeError: it is over `limit` bytes, as announced or as counted.
        ClientGoneError: the client hung up.
    """
    if content_length is not None and content_length > limit:
        raise _too_large(limit)
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


class HangUp:
    """Cancels a task when its client hangs up.

    Watching starts at once, so it comes after the body has been read.
    """

    def __init__(self, receive: Receive, task: asyncio.Task[Any]) -> None:
        self.happened = False
        self._watch = asyncio.ensure_future(self._cancel_on_hang_up(receive, task))

    def stop(self) -> None:
        """Stop watching; the task is not cancelled from here on."""
        self._watch.cancel()

    async def _cancel_on_hang_up(self, receive: Receive, task: asyncio.Task[Any]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.happened = True
        task.cancel()


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"The body is larger than the limit of {limit} bytes. Send a shorter one, or have "
        "'gateway.max_body_bytes' raised."
    )
