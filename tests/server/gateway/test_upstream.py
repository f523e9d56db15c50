"""Where an event stream may be cut."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from server.gateway.upstream import SOCKET_OPTIONS, Upstream, whole_events
from tests.server.gateway.conftest import make_config


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


async def test_connections_are_used_again() -> None:
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n{}")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    upstream = Upstream(make_config().gateway)
    await upstream.start()
    headers: CIMultiDict[str] = CIMultiDict()
    for _ in range(5):
        response = await upstream.post(f"http://127.0.0.1:{port}", "/x", b"{}", headers)
        assert await upstream.whole(response) == b"ok"
        response.close()
    await upstream.close()
    server.close()
    assert opened == 1


async def test_a_machine_that_goes_silent_is_noticed() -> None:
    """A power cut cannot be had here: decision 0009 tells how it was tried."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no")
        await reader.read()
        writer.close()

    upstream = Upstream(make_config().gateway)
    await upstream.start()
    try:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            response = await upstream.post(f"http://127.0.0.1:{port}", "/x", b"{}", CIMultiDict())
            assert response.connection is not None
            assert response.connection.transport is not None
            opened = response.connection.transport.get_extra_info("socket")
            for level, option, value in SOCKET_OPTIONS:
                assert opened.getsockopt(level, option) == value
            response.close()
    finally:
        await upstream.close()
