"""One HTTP/1.1 connection to an engine and the answers that come over it, one after the other.

A general HTTP client looks after redirects, cookies, encodings and proxies, which engines have none
of, and that was two fifths of a request's time in the gateway (decision 0009). What comes is parsed
by llhttp, as a client's request is.
Knows nothing of pools, of engines or of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import httptools

HELD_BYTES = 64 * 1024
"""Of a stream that nobody has taken yet; with more, the engine is read no further for a while."""

Header = tuple[bytes, bytes]


class BrokenError(Exception):
    """The connection ended before the answer did, or what came is not HTTP."""


class SilentError(Exception):
    """Nothing has come for too long."""


class Answer:
    """What an engine answers, as it comes."""

    __slots__ = (
        "_chunks",
        "_connection",
        "_ended",
        "_error",
        "_held",
        "_waiter",
        "_wholly",
        "headers",
        "status",
    )

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        """0 before the head has come."""
        self.headers: list[Header] = []
        """In the order and in the writing in which they came."""
        self._connection = connection
        self._chunks: list[bytes] = []
        self._held = 0
        self._wholly = False
        self._ended = False
        self._error: BrokenError | SilentError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def content_type(self) -> bytes:
        """Without its parameters, in lower case; empty where none was given."""
        for name, value in self.headers:
            if name.lower() == b"content-type":
                return value.partition(b";")[0].strip().lower()
        return b""

    async def head(self) -> None:
        """Wait for status and headers.

        Raises:
            BrokenError: the connection ended before they had come.
            SilentError: nothing has come for too long.
        """
        while not self.status:
            await self._news()

    async def read(self) -> bytes:
        """The whole body; errors as of `head`."""
        self._wholly = True
        while not self._ended:
            self._connection.go_on(self)
            await self._news()
        return self._taken()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; errors as of `head`."""
        while True:
            if self._chunks:
                yield self._taken()
            elif self._ended:
                return
            else:
                self._connection.go_on(self)
                await self._news()

    def close(self) -> None:
        """Want no more of it. Of an answer that is not at its end, the connection is lost."""
        if not self._ended and self._error is None:
            self._connection.give_up(self)

    async def _news(self) -> None:
        """Wait until something has come, or has ended it."""
        if self._error is not None:
            # one of its own: a stored one would hold, by its traceback, all that waited for it
            raise type(self._error)(*self._error.args)
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _taken(self) -> bytes:
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks, self._held = [], 0
        return body

    # What follows is the connection's.

    def began(self, status: int, headers: list[Header]) -> None:
        """The head has come."""
        self.status, self.headers = status, headers
        self._wake()

    def came(self, body: bytes) -> bool:
        """A part of the body has; whether it is time to take some first."""
        self._chunks.append(body)
        self._held += len(body)
        self._wake()
        return self._held > HELD_BYTES and not self._wholly

    def ended(self, error: BrokenError | SilentError | None = None) -> None:
        """Nothing more will come."""
        self._ended, self._error = error is None, error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection(asyncio.Protocol):
    """Asks one thing at a time.

    Args:
        silent_s: seconds without a byte of an answer after which it is given up.
        idle_s: seconds without a question after which the connection is closed.
        on_end: called at the end of each answer, whole or not, with whether the connection can
            be used again.
        on_lost: called once, when there is no connection any more.
    """

    def __init__(
        self,
        silent_s: float,
        idle_s: float,
        on_end: Callable[[Connection, bool], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._silent_s, self._idle_s = silent_s, idle_s
        self._on_end, self._on_lost = on_end, on_lost
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._answer: Answer | None = None
        self._headers: list[Header] = []
        self._paused = False
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    @property
    def usable(self) -> bool:
        """Whether something can be asked now."""
        transport = self._transport
        if transport is None or self._answer is not None or transport.is_closing():
            return False
        # Where the event loop stood still, the timer that closes it may be as late as we are.
        return self.loop.time() - self._since < self._idle_s

    def ask(self, request: bytes) -> Answer:
        """Send a request, head and body; its answer is awaited by what is returned."""
        answer = Answer(self)
        if not self.usable:
            self._on_end(self, False)
            answer.ended(BrokenError("the connection was closed"))
            return answer
        assert self._transport is not None
        self._answer = answer
        self._transport.write(request)
        self._look_within(self._silent_s)
        return answer

    def go_on(self, answer: Answer) -> None:
        """Read on, where reading waited for what was held of this answer to be taken."""
        if self._paused and answer is self._answer and self._transport is not None:
            self._paused = False
            self._since = self.loop.time()
            self._transport.resume_reading()

    def give_up(self, answer: Answer) -> None:
        """Nobody waits for this answer any more."""
        if answer is self._answer:
            self._end(BrokenError("the answer was given up"))

    def close(self) -> None:
        """Break off, whatever is under way."""
        self._end(BrokenError("the connection was closed"))

    def _end(self, error: BrokenError | SilentError) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._finish(error)

    def _finish(self, error: BrokenError | SilentError | None, *, again: bool = False) -> None:
        """The answer, if there is one, is at its end."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.ended(error)
            self._on_end(self, again)

    def _look_within(self, seconds: float) -> None:
        """From now on, see to it that nothing takes longer than this."""
        now = self._since = self.loop.time()
        if self._timer is None or self._due > now + seconds:
            if self._timer is not None:
                self._timer.cancel()
            self._look_at(now + seconds)

    def _look_at(self, moment: float) -> None:
        self._due = moment
        self._timer = self.loop.call_at(moment, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self.loop.time()
        if self._paused:
            self._since = now  # it is not the engine that is slow
        most = self._idle_s if self._answer is None else self._silent_s
        if self._since + most > now:
            self._look_at(self._since + most)
        else:
            self._end(SilentError(f"nothing has come for {most:g} s"))

    # What follows is asyncio's, then the parser's.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._parser = httptools.HttpResponseParser(self)
        self._since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        self._since = self.loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(BrokenError(f"what came is not HTTP ({error})"))

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone, which may be the end of an answer whose length was not told."""
        answer = self._answer
        whole = answer is not None and answer.status and exc is None and _endless(answer.headers)
        self._finish(None if whole else BrokenError("the connection was lost"))
        if self._timer is not None:
            self._timer.cancel()
        self._transport = self._timer = self._parser = None
        self._on_lost(self)

    def on_message_begin(self) -> None:
        """An answer begins."""
        if self._answer is None:
            raise ValueError("nothing was asked")
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers."""
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """All of them."""
        status = self._parser.get_status_code()
        if status >= 200 and self._answer is not None:  # what is below comes before an answer
            self._answer.began(status, self._headers)
        self._headers = []  # trailers are nobody's

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        answer, transport = self._answer, self._transport
        if answer is None or not answer.status or transport is None:
            return
        if answer.came(body) and not self._paused:
            self._paused = True
            transport.pause_reading()

    def on_message_complete(self) -> None:
        """The end of it."""
        answer, transport = self._answer, self._transport
        if answer is None or not answer.status or transport is None:
            return
        self.go_on(answer)
        again = bool(self._parser.should_keep_alive()) and not transport.get_write_buffer_size()
        self._finish(None, again=again)
        if again:
            self._look_within(self._idle_s)
        else:
            transport.abort()


def _endless(headers: list[Header]) -> bool:
    """Whether only the end of the connection ends the body (RFC 9112, section 6.3)."""
    return not any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in headers)
