"""Who hangs up is noticed by those who watch, whatever of the request waits."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from typing import Any

import pytest
import uvloop
from starlette.types import Receive, Scope, Send

from configs.schema import GatewayConfig
from server.gateway.hang_up import WatchedConnection, watchers_of
from tests.server.gateway.conftest import connection_to

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return request.param()


class Watching:
    """Takes a request's body, answers when it may, and notes when the client hangs up."""

    def __init__(self) -> None:
        self.taken = asyncio.Event()
        self.answers = asyncio.Event()
        self.gone = asyncio.Event()
        self.stops = False
        """Whether it watches only until it answers."""
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        watchers = watchers_of(scope)
        watchers.add(self._hung_up)
        self.taken.set()
        await self.answers.wait()
        if self.stops:
            watchers.discard(self._hung_up)
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    def _hung_up(self) -> None:
        self.calls += 1
        self.gone.set()


@pytest.mark.parametrize("size", [2, 1_000_000])
async def test_a_client_that_hangs_up_is_noticed(size: int) -> None:
    application = Watching()
    async with connection_to(application, GatewayConfig()) as (_, writer), asyncio.timeout(60):
        writer.write(HEAD % size + b"x" * size)
        await application.taken.wait()
        assert not application.gone.is_set()
        writer.close()
        await application.gone.wait()
        application.answers.set()
    assert application.calls == 1


async def test_who_watches_no_longer_is_not_told() -> None:
    application = Watching()
    application.stops = True
    application.answers.set()
    async with connection_to(application, GatewayConfig()) as (reader, writer):
        async with asyncio.timeout(60):
            writer.write(HEAD % 0)
            await reader.readuntil(b"ok")
            writer.close()
            await writer.wait_closed()
    assert application.calls == 0


async def test_requests_that_wait_behind_another_are_not_taken_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connections = []
    made = WatchedConnection.connection_made

    def noted(connection: WatchedConnection, transport: asyncio.Transport) -> None:
        connections.append(connection)
        made(connection, transport)

    monkeypatch.setattr(WatchedConnection, "connection_made", noted)
    application = Watching()
    async with connection_to(application, GatewayConfig()) as (_, writer):
        writer.write(HEAD % 0 * 300_000)
        async with asyncio.timeout(60):
            await application.taken.wait()
        await asyncio.sleep(1)
        assert 0 < len(connections[0].pipeline) < 20_000, "a few reads' worth"
        writer.transport.abort()
        application.answers.set()


@pytest.mark.parametrize("told", ["by a call", "by a message"])
async def test_requests_that_wait_behind_another_end_with_it_quietly(
    told: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrong: list[dict[str, Any]] = []
    connections: list[weakref.ref[WatchedConnection]] = []

    async def cut_short(scope: Scope, receive: Any, send: Send) -> None:
        """Ends without an answer once its client has gone, as the gateway's requests do."""
        assert not (await receive()).get("more_body")
        connections.append(weakref.ref(receive.__self__.on_response.__self__))
        if told == "by a message":
            assert (await receive())["type"] == "http.disconnect"
            return
        gone = asyncio.Event()
        watchers_of(scope).add(gone.set)
        await gone.wait()

    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
    gc.disable()
    try:
        async with connection_to(cut_short, GatewayConfig()) as (_, writer):
            writer.write(HEAD % 0 * 2)
            async with asyncio.timeout(60):
                while not connections:  # noqa: ASYNC110 - the application has no event for it
                    await asyncio.sleep(0.01)
                writer.close()
                while connections[0]() is not None:  # noqa: ASYNC110 - nor has the collector
                    await asyncio.sleep(0.01)
    finally:
        gc.enable()
    assert len(connections) == 1, "the second is not begun"
    assert not wrong
    assert not [entry for entry in caplog.records if entry.levelno >= logging.ERROR]


async def test_another_server_has_nobody_who_watches() -> None:
    assert watchers_of({"type": "http"}) == set()
