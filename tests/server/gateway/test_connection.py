"""Answers over one connection, however they come and wherever they end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.connection import HELD_BYTES, Answer, BrokenError, Connection, SilentError

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
ASK = b"POST /x HTTP/1.1\r\nhost: engine\r\ncontent-length: 2\r\n\r\n{}"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    """Python's own event loop, and the one that a gateway runs on: each test is for both."""
    return request.param()


class Wire(asyncio.Transport):
    """Takes what is written; what comes is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = self.paused = False
        self.unsent = 0

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_write_buffer_size(self) -> int:
        return self.unsent


class Ends:
    """How answers ended, and whether the connection is gone."""

    def __init__(self) -> None:
        self.again: list[bool] = []
        self.lost = 0

    def ended(self, _: Connection, again: bool) -> None:
        self.again.append(again)

    def gone(self, _: Connection) -> None:
        self.lost += 1


def wired(ends: Ends, *, silent_s: float = 60.0, idle_s: float = 60.0) -> tuple[Connection, Wire]:
    connection, wire = Connection(silent_s, idle_s, ends.ended, ends.gone), Wire()
    connection.connection_made(wire)
    return connection, wire


def headed(ends: Ends, size: int) -> tuple[Connection, Wire, Answer]:
    """An answer whose head has come, and whose body of so many bytes has not."""
    connection, wire = wired(ends)
    answer = connection.ask(ASK)
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
    return connection, wire, answer


async def take(answer: Answer, into: bytearray, *, streamed: bool) -> None:
    """An answer as it comes, or once it has."""
    await answer.head()
    if streamed:
        async for part in answer.chunks():
            into += part
    else:
        into += await answer.read()


def framed(how: str, body: bytes, cuts: list[int]) -> bytes:
    """An answer whose body ends by its length, by a last chunk, or with the connection."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/Plain; charset=utf-8\r\n"
    if how == "length":
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    if how == "end":
        return head + b"\r\n" + body
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    parts = [body[start:end] for start, end in itertools.pairwise(edges)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nX-Sum: 1\r\n\r\n"


@given(
    how=st.sampled_from(["length", "chunks", "end"]),
    body=st.binary(max_size=200),
    parts=st.lists(st.integers(0, 1000), max_size=5),
    cuts=st.lists(st.integers(0, 1000), max_size=8),
    before=st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"]),
    streamed=st.booleans(),
)
def test_however_an_answer_is_cut_it_is_whole(
    how: str, body: bytes, parts: list[int], cuts: list[int], before: bytes, streamed: bool
) -> None:
    async def run() -> None:
        ends = Ends()
        connection, wire = wired(ends)
        data = before + framed(how, body, parts)
        for turn in (1, 2):  # the second answer over the same connection
            answer = connection.ask(ASK)
            came = bytearray()
            found = asyncio.create_task(take(answer, came, streamed=streamed))
            edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
            for start, end in itertools.pairwise(edges):
                connection.data_received(data[start:end])
                await asyncio.sleep(0)
            if how == "end":
                connection.connection_lost(None)
            await found
            assert came == body
            assert (answer.status, answer.content_type) == (200, b"text/plain")
            assert answer.headers[0][0] == b"Content-Type"
            assert b"X-Sum" not in dict(answer.headers)
            if how == "end":
                assert (ends.again, ends.lost) == ([False], 1)
                return
            assert ends.again == [True] * turn
        assert connection.usable
        assert not wire.closed

    asyncio.run(run())


@given(
    how=st.sampled_from(["length", "chunks"]),
    body=st.binary(min_size=1, max_size=80),
    cut=st.integers(0, 1000),
    streamed=st.booleans(),
)
def test_an_answer_that_breaks_off_is_never_taken_for_whole(
    how: str, body: bytes, cut: int, streamed: bool
) -> None:
    async def run() -> None:
        ends = Ends()
        connection, _ = wired(ends)
        data = framed(how, body, [])
        answer = connection.ask(ASK)
        connection.data_received(data[: cut % len(data)])
        connection.connection_lost(None)
        came = bytearray()
        with pytest.raises(BrokenError):
            await take(answer, came, streamed=streamed)
        assert body.startswith(came)
        assert (ends.again, ends.lost) == ([False], 1)

    asyncio.run(run())


async def test_a_reset_is_the_end_of_no_answer() -> None:
    """Of one whose length was not told, only an orderly end is."""
    connection, _ = wired(Ends())
    answer = connection.ask(ASK)
    connection.data_received(framed("end", b"half of i", []))
    connection.connection_lost(ConnectionResetError())
    with pytest.raises(BrokenError):
        await answer.read()


@pytest.mark.parametrize(
    "data",
    [
        b"220 mail.example ESMTP\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    ],
)
async def test_what_is_no_answer_breaks_the_connection(data: bytes) -> None:
    ends = Ends()
    connection, wire = wired(ends)
    answer = connection.ask(ASK)
    connection.data_received(data)
    with pytest.raises(BrokenError):
        await answer.head()
    assert wire.closed
    assert ends.again == [False]
    with pytest.raises(BrokenError):
        await connection.ask(ASK).head()
    assert ends.again == [False, False], "whoever asks in vain gets its place back, too"


@pytest.mark.parametrize("unasked", [b"HTTP/1.1 408 Request Timeout\r\n\r\n", OK])
async def test_what_nobody_asked_for_answers_nobody(unasked: bytes) -> None:
    """A second answer behind the first one, or a word of farewell, is not the next one's."""
    ends = Ends()
    connection, wire = wired(ends)
    answer = connection.ask(ASK)
    connection.data_received(OK + unasked)
    assert await answer.read() == b"ok"
    assert wire.closed
    assert not connection.usable


@pytest.mark.parametrize(
    ("data", "unsent"),
    [
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", 0),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", 0),
        (b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nok", 7),
    ],
)
async def test_a_connection_that_is_not_to_be_used_again_is_not(data: bytes, unsent: int) -> None:
    """Its server said so, or has answered before it had all that was asked."""
    ends = Ends()
    connection, wire = wired(ends)
    wire.unsent = unsent
    answer = connection.ask(ASK)
    connection.data_received(data)
    assert await answer.read() == b"ok"
    assert ends.again == [False]
    assert wire.closed


async def test_a_stream_that_nobody_takes_is_read_no_further() -> None:
    ends, size = Ends(), 4 * HELD_BYTES
    connection, wire, answer = headed(ends, size)
    connection.data_received(bytes(HELD_BYTES))
    assert not wire.paused
    connection.data_received(bytes(1))
    assert wire.paused
    parts = answer.chunks()
    assert len(await anext(parts)) == HELD_BYTES + 1
    assert wire.paused, "as long as what was taken may not have been passed on"
    coming = asyncio.ensure_future(anext(parts))
    await asyncio.sleep(0)
    assert not wire.paused
    connection.data_received(b"x")
    assert await coming == b"x"
    assert not wire.paused, "what was taken is held no more"
    connection.data_received(bytes(2 * HELD_BYTES))
    assert wire.paused
    connection.data_received(bytes(size - 3 * HELD_BYTES - 2))
    assert not wire.paused, "the next answer's reader cannot know of this one's"
    assert sum([len(part) async for part in parts]) == size - HELD_BYTES - 2
    assert ends.again == [True]


async def test_a_whole_answer_is_read_however_large_it_is() -> None:
    ends, size = Ends(), 4 * HELD_BYTES
    connection, wire, answer = headed(ends, size)
    connection.data_received(bytes(2 * HELD_BYTES))
    assert wire.paused
    found = asyncio.create_task(answer.read())
    await asyncio.sleep(0)
    assert not wire.paused
    for _ in range(2):
        connection.data_received(bytes(HELD_BYTES))
        assert not wire.paused
    assert len(await found) == size


async def test_patience_begins_with_what_is_waited_for() -> None:
    """Neither the time between two questions counts nor that in which a client took nothing."""
    connection, wire = wired(Ends(), silent_s=1.0, idle_s=1.0)
    answer = connection.ask(ASK)
    connection.data_received(OK)
    await asyncio.sleep(0.7)
    answer = connection.ask(ASK)
    await asyncio.sleep(0.7)
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (HELD_BYTES + 2))
    connection.data_received(bytes(HELD_BYTES + 1))
    assert wire.paused
    parts = answer.chunks()
    await anext(parts)
    await asyncio.sleep(0.7)
    coming = asyncio.ensure_future(anext(parts))
    await asyncio.sleep(0.7)
    connection.data_received(b"x")
    assert await coming == b"x"


async def test_a_connection_that_has_lain_too_long_is_not_used() -> None:
    """Its server closes it then. The timer may be late: here the event loop stands still."""
    connection, _ = wired(Ends(), idle_s=0.2)
    answer = connection.ask(ASK)
    connection.data_received(OK)
    assert await answer.read() == b"ok"
    assert connection.usable
    time.sleep(0.3)  # noqa: ASYNC251
    assert not connection.usable


async def test_a_lost_answer_holds_nothing() -> None:
    """Whoever waited for it is freed at once, with all that was asked: engines die with many at
    work, and the garbage collector comes late."""

    class Asked:
        pass

    async def ask(connection: Connection) -> weakref.ref[Asked]:
        asked = Asked()
        answer = connection.ask(ASK)
        connection.loop.call_soon(connection.connection_lost, None)
        with pytest.raises(BrokenError):
            await answer.head()
        return weakref.ref(asked)

    gc.collect()
    gc.disable()
    try:
        connection, _ = wired(Ends())
        assert (await ask(connection))() is None
    finally:
        gc.enable()


@contextlib.asynccontextmanager
async def engine(
    serve: Serve, *, silent_s: float = 0.3, idle_s: float = 30.0
) -> AsyncIterator[tuple[Connection, Ends]]:
    """A connection to a server that is up to the test."""
    ends = Ends()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(silent_s, idle_s, ends.ended, ends.gone), "127.0.0.1", port
    )
    try:
        yield connection, ends
    finally:
        connection.close()
        server.close()
        await asyncio.sleep(0.05)
        assert ends.lost == 1


async def asked(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n{}")


async def test_one_question_after_another() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(20):
            await asked(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n%02d" % number)
        await reader.read()
        writer.close()

    async with engine(serve) as (connection, ends):
        for number in range(20):
            answer = connection.ask(ASK)
            await answer.head()
            assert await answer.read() == b"%02d" % number
        assert ends.again == [True] * 20


@pytest.mark.parametrize("said", [b"", OK[:-1]])
async def test_an_engine_that_says_nothing_more_is_given_up(said: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(said)
        await reader.read()
        writer.close()

    async with engine(serve) as (connection, ends):
        began = connection.loop.time()
        answer = connection.ask(ASK)
        with pytest.raises(SilentError):
            await take(answer, bytearray(), streamed=True)
        assert 0.2 < connection.loop.time() - began < 2
        assert ends.again == [False]
        assert not connection.usable


async def test_an_engine_that_is_merely_slow_is_waited_for() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        for byte in OK[:-6], b"\r", b"\n\r", b"\no", b"k":
            writer.write(byte)
            await asyncio.sleep(0.15)
        await reader.read()
        writer.close()

    async with engine(serve) as (connection, _):
        answer = connection.ask(ASK)
        assert await answer.read() == b"ok"


async def test_a_client_that_is_slow_is_not_the_engine_s_silence() -> None:
    size = 40 * HELD_BYTES

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        writer.write(bytes(size))
        await reader.read()
        writer.close()

    async with engine(serve) as (connection, ends):
        answer = connection.ask(ASK)
        taken = 0
        async for part in answer.chunks():
            if not taken:
                await asyncio.sleep(1)
            taken += len(part)
        assert taken == size
        assert ends.again == [True]


async def test_an_answer_nobody_wants_any_more_is_broken_off() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(OK[:-1])
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()
        writer.close()

    async with engine(serve) as (connection, ends):
        answer = connection.ask(ASK)
        await answer.head()
        answer.close()
        await asyncio.wait_for(gone.wait(), 5)
        assert ends.again == [False]
        with pytest.raises(BrokenError):
            await answer.read()


async def test_an_idle_connection_is_closed() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(OK)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()
        writer.close()

    async with engine(serve, silent_s=30.0, idle_s=0.3) as (connection, ends):
        assert await connection.ask(ASK).read() == b"ok"
        assert connection.usable
        await asyncio.wait_for(gone.wait(), 5)
        assert not connection.usable
        assert ends.again == [True]
