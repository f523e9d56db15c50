"""Connections whose request heads are too slow or too large do not last.

uvicorn waits for a head as long as it takes and keeps all of it, and for the rest of a body that
nobody reads any more; whoever opens a few thousand connections and says nothing would keep
everybody else out. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from configs.schema import GatewayConfig
from server.gateway.errors import (
    BadRequestError,
    GatewayError,
    HeadersTooLargeError,
    RequestTimeoutError,
    body_of,
)
from server.gateway.hang_up import WatchedConnection

REQUEST_LINE_BYTES = 16 * 1024
"""Room for the request line beside the headers' own limit."""

PHRASES = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def protocol_for(config: GatewayConfig) -> Any:
    """The protocol class of a server: uvicorn's own, with this gateway's limits."""
    return partial(
        LimitedHeads,
        timeout_s=config.client_timeout_s,
        max_bytes=config.max_header_bytes + REQUEST_LINE_BYTES,
    )


class LimitedHeads(WatchedConnection):
    """One connection."""

    def __init__(self, *arguments: Any, timeout_s: float, max_bytes: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timeout_s, self._max_bytes = timeout_s, max_bytes
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come: its first request's head is due."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some of a request has come."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes:  # most heads come whole and need no timer
            if self._head_bytes > self._max_bytes:
                self._refuse(
                    HeadersTooLargeError(
                        f"The request's head is larger than {self._max_bytes} bytes. Send fewer "
                        "or shorter headers, or have 'gateway.max_header_bytes' raised."
                    )
                )
            elif self._deadline is None:
                self._expect_head()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is whole; the next one may come at its leisure."""
        self._in_head = True
        self._head_bytes = 0
        self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is whole. Of a request that was refused before its body had come, the rest may
        come for a while, so that the client reads the answer; it may not come for ever."""
        super().on_response_complete()
        if not self._in_head and self.cycle.response_complete and self._deadline is None:
            self._deadline = self.loop.call_later(self._timeout_s, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(BadRequestError(f"{msg} Send an HTTP/1.1 request."))

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(self._timeout_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._head_bytes:
            self._refuse(
                RequestTimeoutError(
                    f"The request's head did not come within {self._timeout_s:g} s. Send it again."
                )
            )
        else:
            self.transport.close()  # has said nothing, and expects nothing

    def _refuse(self, error: GatewayError) -> None:
        """Answer with an error, unless an answer is under way, and hang up."""
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = body_of(error)
            head = (
                f"HTTP/1.1 {error.status} {PHRASES[error.status]}\r\n"
                "content-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
