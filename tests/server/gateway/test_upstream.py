"""Connections to engines, and where an event stream may be cut."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from server.gateway.errors import EngineLostError
from server.gateway.upstream import SOCKET_OPTIONS, UnreachableError, Upstream, whole_events
from tests.server.gateway.conftest import make_config

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@given(
    texts=st.lists(st.text(st.characters(categories=("L", "N")), max_size=8), max_size=6),
    newline=st.sampled_from(["\n", "\r\n"]),
    cuts=st.lists(st.integers(0, 120), max_size=8),
)
def test_however_a_stream_is_cut_its_bytes_and_events_stay_whole(
    texts: list[str], newline: str, cuts: list[int]
) -> None:
    events = [f"data: {text}{newline}{newline}".encode() for text in texts]
    stream = b"".join(events)
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    pieces, held = [], b""
    for start, end in itertools.pairwise(edges):
        ready, held = whole_events(held + stream[start:end])
        if ready:
            pieces.append(ready)
    assert b"".join(pieces) == stream
    assert held == b""
    ends = {sum(map(len, events[: n + 1])) for n in range(len(events))}
    at = 0
    for piece in pieces:
        at += len(piece)
        assert at in ends


@contextlib.asynccontextmanager
async def engine(
    *replies: bytes, last: bool = True, key: str | None = None, **config: float
) -> AsyncIterator[tuple[Upstream, str, list[list[bytes]]]]:
    """A pool, and the root of a server that gives these replies over each connection and then
    closes it, unless these are not its last words; told is what was asked over each."""
    told: list[list[bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked: list[bytes] = []
        told.append(asked)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            for reply in replies:
                asked.append(await reader.readuntil(b"\r\n\r\n{}"))
                writer.write(reply)
            if not last:
                await reader.read()
        writer.close()

    upstream = Upstream(make_config(**config).gateway, engine_key=key)
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield upstream, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", told
    finally:
        upstream.close()
        server.close()


async def ask(upstream: Upstream, root: str, **headers: str) -> bytes:
    answer = await upstream.post(root, "/x", b"{}", CIMultiDict(headers))
    try:
        return await upstream.whole(answer)
    finally:
        answer.close()


async def test_connections_are_used_again() -> None:
    async with engine(*[OK] * 5) as (upstream, root, told):
        for _ in range(5):
            assert await ask(upstream, root) == b"ok"
        assert len(told) == 1


async def test_what_the_engine_is_told() -> None:
    async with engine(OK, key="secret") as (upstream, root, told):
        await ask(upstream, root, traceparent="00-1", accept="text/é")
        host = root.removeprefix("http://")
        assert told == [
            [
                f"POST /x HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer secret\r\n"
                "traceparent: 00-1\r\naccept: text/é\r\ncontent-length: 2\r\n\r\n{}".encode(
                    "latin-1"
                )
            ]
        ]


@pytest.mark.parametrize("value", ["a\r\nx-other: b", "a\nb", "a\rb"])
async def test_a_header_is_one_line(value: str) -> None:
    async with engine(OK) as (upstream, root, told):
        with pytest.raises(ValueError, match="line break"):
            await ask(upstream, root, accept=value)
        assert await ask(upstream, root) == b"ok"
        assert len(told) == 1


async def test_a_connection_that_the_engine_has_closed_is_not_asked() -> None:
    async with engine(OK, OK) as (upstream, root, told):
        for _ in range(6):
            assert await ask(upstream, root) == b"ok"
            await asyncio.sleep(0.02)  # that it is closed is known by then
        assert [len(asked) for asked in told] == [2, 2, 2]


async def test_an_engine_that_goes_away_is_lost() -> None:
    async with engine(OK[:-1]) as (upstream, root, _):
        with pytest.raises(EngineLostError):
            await ask(upstream, root)
    async with engine() as (upstream, root, _):
        with pytest.raises(EngineLostError):
            await ask(upstream, root)
        with pytest.raises(EngineLostError):
            await ask(upstream, root)


async def test_no_more_connections_than_may_be_are_used_at_once() -> None:
    async with engine(OK[:-1], last=False, max_connections=2) as (upstream, root, told):
        held = [await upstream.post(root, "/x", b"{}", CIMultiDict()) for _ in range(2)]
        waiting = [
            asyncio.create_task(upstream.post(root, "/x", b"{}", CIMultiDict())) for _ in "ab"
        ]
        await asyncio.sleep(0.05)
        assert len(told) == 2, "two wait for the two"
        waiting[0].cancel()
        held[0].close()
        assert (await waiting[1]).status == 200
        assert len(told) == 3


async def test_who_stops_waiting_for_an_answer_gives_up_its_place() -> None:
    async with engine(b"", last=False, max_connections=1) as (upstream, root, told):
        for asked in range(1, 4):
            waiting = asyncio.create_task(ask(upstream, root))
            while len(told) < asked:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting


async def test_a_closed_pool_asks_nobody() -> None:
    async with engine(b"", last=False, max_connections=1) as (upstream, root, told):
        under_way, waiting = [asyncio.create_task(ask(upstream, root)) for _ in range(2)]
        while not told:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        upstream.close()
        for each in under_way, waiting:
            with pytest.raises(EngineLostError):
                await each
        assert sum(map(len, told)) <= 1


async def test_a_system_without_an_option_does_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.gateway.upstream.SOCKET_OPTIONS", ((socket.IPPROTO_TCP, 99, 1),))
    async with engine(OK) as (upstream, root, _):
        assert await ask(upstream, root) == b"ok"
    assert "option 99" in caplog.text


@pytest.mark.parametrize("root", ["https://127.0.0.1:1", "127.0.0.1:1", "http://:1"])
async def test_what_is_no_url_of_an_engine_cannot_be_reached(root: str) -> None:
    upstream = Upstream(make_config().gateway)
    with pytest.raises(UnreachableError, match="is not the http:"):
        await ask(upstream, root)


async def test_an_engine_that_takes_no_connection_cannot_be_reached() -> None:
    """Refused at once, or not taken in time: the system queues one connection, and then none."""
    upstream = Upstream(make_config(connect_timeout_s=0.2, max_connections=1).gateway)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        root = f"http://127.0.0.1:{port}"
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
            for _ in range(2):
                with pytest.raises(UnreachableError):
                    await ask(upstream, root)
    with pytest.raises(UnreachableError):
        await ask(upstream, root)
    async with engine(OK) as (_, root, _):
        assert await ask(upstream, root) == b"ok", "nobody's failure has cost the one place"
    upstream.close()


async def test_a_machine_that_goes_silent_is_noticed() -> None:
    """A power cut cannot be had here: decision 0009 tells how it was tried."""
    opened: list[socket.socket] = []
    loop = asyncio.get_running_loop()
    connect = loop.create_connection

    async def watched(*arguments: Any, **named: Any) -> Any:
        transport, protocol = await connect(*arguments, **named)
        opened.append(transport.get_extra_info("socket"))
        return transport, protocol

    loop.create_connection = watched  # type: ignore[method-assign]
    async with engine(OK, OK) as (upstream, root, _):
        await ask(upstream, root)
        for level, option, value in SOCKET_OPTIONS:
            assert opened[0].getsockopt(level, option) == value
