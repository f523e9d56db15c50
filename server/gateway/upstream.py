"""The gateway's HTTP client towards the engines.

Passes bytes on as they come; what it adds is telling apart the ways in which an engine can fail to
answer: not reached (another replica may be tried), lost, or silent. This module knows nothing of
clients, models or routing.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from configs.schema import GatewayConfig
from server.gateway.errors import EngineLostError, EngineTimeoutError

IDLE_CONNECTION_S = 4.0
"""An idle connection is dropped before vLLM drops it (after 5 s), so that no request is sent into
a connection that is being closed."""

SILENT_MACHINE_S = 10
"""Seconds without a sign of life from a worker's machine after which its connections are lost. One
that has lost its power or its network says no more, not even that it is gone. A process that is
merely slow has a kernel that answers for it."""

SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_MACHINE_S // 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENT_MACHINE_S // 2),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MACHINE_S * 1000),
)
"""Of connections to engines (tcp(7)): when to ask a silent one, and how long what was sent may go
without its receipt."""

EVENT_END = (b"\n\n", b"\r\n\r\n")
"""A blank line ends a server-sent event (WHATWG HTML, section 9.2.6)."""


class UnreachableError(Exception):
    """The engine took no connection, so it has not seen the request."""


class Upstream:
    """Pooled connections to all engines."""

    def __init__(self, config: GatewayConfig, *, engine_key: str | None = None) -> None:
        """A pool that is not open yet.

        Args:
            config: timeouts, and connections at the most.
            engine_key: what engines ask for; none: nothing.
        """
        self._config = config
        self._authorization = f"Bearer {engine_key}" if engine_key else None
        self._session: aiohttp.ClientSession | None = None
        self._urls: dict[tuple[str, str], URL] = {}

    async def start(self) -> None:
        """Open the pool."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._config.max_connections,
                keepalive_timeout=IDLE_CONNECTION_S,
                socket_factory=_open_socket,
            ),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=self._config.connect_timeout_s,
                sock_read=self._config.request_timeout_s,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    async def post(
        self, root: str, path: str, body: bytes, headers: CIMultiDict[str]
    ) -> aiohttp.ClientResponse:
        """Send a request and wait for the answer's head; the caller closes or drains the answer.

        Raises:
            UnreachableError: no connection could be made.
            EngineLostError: the connection broke before the head had come.
            EngineTimeoutError: the engine was silent for too long.
        """
        assert self._session is not None, "start() comes first"
        if self._authorization is not None:
            headers["authorization"] = self._authorization
        try:
            return await self._session.post(
                self._url(root, path), data=body, headers=headers, allow_redirects=False
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise UnreachableError(str(error)) from error
        except aiohttp.ServerTimeoutError:
            raise self._silent() from None
        except aiohttp.ClientError:
            raise self._lost() from None

    async def whole(self, response: aiohttp.ClientResponse) -> bytes:
        """The whole body of an answer, its connection given back.

        Raises:
            EngineLostError: the connection broke before the end.
            EngineTimeoutError: the engine was silent for too long.
        """
        try:
            return await response.read()
        except aiohttp.ServerTimeoutError:
            raise self._silent() from None
        except aiohttp.ClientError:
            raise self._lost() from None

    async def events(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The bytes of an event stream, as they come, cut only where an event ends.

        An event of which a part has not come yet is held back, so that whatever is written after
        a stream that broke is read as an event of its own.

        Raises:
            EngineLostError: the connection broke before the end.
            EngineTimeoutError: the engine was silent for too long.
        """
        held = b""
        try:
            async for chunk in response.content.iter_any():
                ready, held = whole_events(held + chunk if held else chunk)
                if ready:
                    yield ready
        except aiohttp.ServerTimeoutError:
            raise self._silent() from None
        except aiohttp.ClientError:
            raise self._lost() from None
        if held:
            yield held

    def _url(self, root: str, path: str) -> URL:
        url = self._urls.get((root, path))
        if url is None:
            if len(self._urls) >= 4096:  # engines move to new ports for as long as we live
                self._urls.clear()
            url = self._urls[(root, path)] = URL(root + path)
        return url

    def _lost(self) -> EngineLostError:
        return EngineLostError(
            "The engine that was answering went away. Send the request again in "
            f"{self._config.retry_after_s} s: nothing of it is kept.",
            retry_after_s=self._config.retry_after_s,
        )

    def _silent(self) -> EngineTimeoutError:
        return EngineTimeoutError(
            f"The engine was silent for {self._config.request_timeout_s:g} s. Ask for fewer tokens "
            "or stream, or have 'gateway.request_timeout_s' raised."
        )


def _open_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, *_ = address
    opened = socket.socket(family, kind, protocol)
    for level, option, value in SOCKET_OPTIONS:
        opened.setsockopt(level, option, value)
    return opened


def whole_events(data: bytes) -> tuple[bytes, bytes]:
    """Split a stream's bytes behind its last complete event: what may go on, what has to wait."""
    if data.endswith(EVENT_END):
        return data, b""
    cut = max(at + len(end) if (at := data.rfind(end)) >= 0 else 0 for end in EVENT_END)
    return data[:cut], data[cut:]
