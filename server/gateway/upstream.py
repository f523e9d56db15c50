"""The gateway's HTTP client towards the engines.

Passes bytes on as they come; what it adds is telling apart the ways in which an engine can fail to
answer: not reached (another replica may be tried), lost, or silent. This module knows nothing of
clients, models or routing.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from multidict import CIMultiDict

from configs.schema import GatewayConfig
from server.gateway.connection import Answer, BrokenError, Connection, SilentError
from server.gateway.errors import EngineLostError, EngineTimeoutError

logger = logging.getLogger(__name__)

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


Place = tuple[str, int]
"""Host and port."""


class UnreachableError(Exception):
    """The engine took no connection, so it has not seen the request."""


class Upstream:
    """Pooled connections to all engines."""

    def __init__(self, config: GatewayConfig, *, engine_key: str | None = None) -> None:
        """A pool without a connection.

        Args:
            config: timeouts, and connections at the most.
            engine_key: what engines ask for; none: nothing.
        """
        self._config = config
        self._authorization = f"authorization: Bearer {engine_key}\r\n" if engine_key else ""
        self._room = asyncio.Semaphore(config.max_connections)
        self._connections: dict[Connection, Place] = {}
        self._idle: dict[Place, list[Connection]] = {}
        self._closed = False
        self._places: dict[tuple[str, str], tuple[Place, bytes]] = {}

    def close(self) -> None:
        """Break off every connection, and those that are being made."""
        self._closed = True
        for connection in list(self._connections):
            connection.close()

    async def post(self, root: str, path: str, body: bytes, headers: CIMultiDict[str]) -> Answer:
        """Send a request and wait for the answer's head; the caller closes the answer.

        Args:
            root: URL of the engine.
            path: what is asked there.
            body: JSON.
            headers: those that are not about the connection.

        Raises:
            UnreachableError: no connection could be made.
            EngineLostError: the connection broke before the head had come.
            EngineTimeoutError: the engine was silent for too long.
        """
        place, begin = self._place(root, path)
        request = _request(begin, headers, body)
        await self._room.acquire()
        connection = self._rested(place)
        if connection is None:
            try:
                connection = await self._connect(place)
            except BaseException:
                self._room.release()
                raise
        answer = connection.ask(request)
        try:
            await answer.head()
        except SilentError:
            raise self._silent() from None
        except BrokenError:
            raise self._lost() from None
        except BaseException:
            answer.close()
            raise
        return answer

    async def whole(self, answer: Answer) -> bytes:
        """The whole body of an answer.

        Raises:
            EngineLostError: the connection broke before the end.
            EngineTimeoutError: the engine was silent for too long.
        """
        try:
            return await answer.read()
        except SilentError:
            raise self._silent() from None
        except BrokenError:
            raise self._lost() from None

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        """The bytes of an event stream, as they come, cut only where an event ends.

        An event of which a part has not come yet is held back, so that whatever is written after
        a stream that broke is read as an event of its own.

        Raises:
            EngineLostError: the connection broke before the end.
            EngineTimeoutError: the engine was silent for too long.
        """
        held = b""
        try:
            async for chunk in answer.chunks():
                ready, held = whole_events(held + chunk if held else chunk)
                if ready:
                    yield ready
        except SilentError:
            raise self._silent() from None
        except BrokenError:
            raise self._lost() from None
        if held:
            yield held

    def _place(self, root: str, path: str) -> tuple[Place, bytes]:
        """Where an engine listens, and how a request to it begins."""
        found = self._places.get((root, path))
        if found is None:
            if len(self._places) >= 4096:  # engines move to new ports for as long as we live
                self._places.clear()
            url = urlsplit(root)
            if url.scheme != "http" or not url.hostname:
                raise UnreachableError(f"'{root}' is not the http:// URL of an engine")
            place = url.hostname, url.port or 80
            begin = f"POST {url.path}{path} HTTP/1.1\r\nhost: {url.netloc}\r\n{self._authorization}"
            found = self._places[(root, path)] = place, begin.encode("latin-1")
        return found

    def _rested(self, place: Place) -> Connection | None:
        """The connection that was used last, if there is one."""
        idle = self._idle.get(place)
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self, place: Place) -> Connection:
        config, loop = self._config, asyncio.get_running_loop()

        def made() -> Connection:
            return Connection(config.request_timeout_s, IDLE_CONNECTION_S, self._ended, self._gone)

        try:
            async with asyncio.timeout(config.connect_timeout_s):
                transport, connection = await loop.create_connection(made, *place)
        except OSError as error:  # TimeoutError is one
            raise UnreachableError(str(error) or "no connection was made in time") from error
        self._connections[connection] = place
        if self._closed:
            connection.close()
        else:
            _set_options(transport.get_extra_info("socket"))
        return connection

    def _ended(self, connection: Connection, again: bool) -> None:
        """An answer is at its end."""
        self._room.release()
        place = self._connections.get(connection)
        if again and place is not None:
            self._idle.setdefault(place, []).append(connection)

    def _gone(self, connection: Connection) -> None:
        place = self._connections.pop(connection, None)
        idle = self._idle.get(place) if place is not None else None
        if idle is not None and connection in idle:
            idle.remove(connection)
        if idle == [] and place is not None:
            del self._idle[place]

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


def _set_options(opened: socket.socket) -> None:
    for level, option, value in SOCKET_OPTIONS:
        try:
            opened.setsockopt(level, option, value)
        except OSError as error:  # without it a silent machine is noticed later, no more
            logger.warning("option %d of connections to engines: %s", option, error)


def _request(begin: bytes, headers: CIMultiDict[str], body: bytes) -> bytes:
    """The bytes of a request.

    Raises:
        ValueError: a header would be more than one line, and so a request within the request.
    """
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if not lines.count("\r") == lines.count("\n") == len(headers):
        raise ValueError("a header for the engine holds a line break")
    return b"%b%bcontent-length: %d\r\n\r\n%b" % (begin, lines.encode("latin-1"), len(body), body)


def whole_events(data: bytes) -> tuple[bytes, bytes]:
    """Split a stream's bytes behind its last complete event: what may go on, what has to wait."""
    if data.endswith(EVENT_END):
        return data, b""
    cut = max(at + len(end) if (at := data.rfind(end)) >= 0 else 0 for end in EVENT_END)
    return data[:cut], data[cut:]
