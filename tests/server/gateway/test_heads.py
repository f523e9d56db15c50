"""Request heads that are slow, large, or no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from starlette.types import Receive, Scope, Send

from configs.schema import GatewayConfig
from server.gateway.heads import REQUEST_LINE_BYTES
from tests.server.gateway.conftest import connection_to

LIMIT = 4096


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers when the body has come, or refuses to read it."""
    while scope["path"] != "/refused" and (await receive()).get("more_body"):
        pass
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def connected(
    timeout_s: float,
) -> contextlib.AbstractAsyncContextManager[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server with that limit."""
    limits = GatewayConfig(client_timeout_s=timeout_s, max_header_bytes=LIMIT)
    return connection_to(application, limits)


async def rest(reader: asyncio.StreamReader) -> tuple[bytes, dict[str, object]]:
    """The last answer of a connection: its status line and its JSON."""
    async with asyncio.timeout(60):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    return head.splitlines()[0], json.loads(body)["error"]


async def test_who_says_nothing_is_hung_up_on() -> None:
    async with connected(0.1) as (reader, _), asyncio.timeout(60):
        assert await reader.read() == b""


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"])
async def test_a_slow_head_is_refused(first: bytes) -> None:
    async with connected(0.3) as (reader, writer):
        if first:
            writer.write(first)
            async with asyncio.timeout(60):
                assert b"ok" in await reader.readuntil(b"ok")
        writer.write(b"GET / HTTP/1.1\r\nhost: ")
        line, error = await rest(reader)
        assert line == b"HTTP/1.1 408 Request Timeout"
        assert error["code"] == "request_timeout"


@pytest.mark.parametrize(
    "endless",
    [b"GET /" + b"x" * 100, b"GET / HTTP/1.1\r\na: " + b"x" * 100, b"GET / HTTP/1.1\r\na: b"],
)
async def test_an_endless_head_is_refused(endless: bytes) -> None:
    async with connected(60) as (reader, writer):
        writer.write(endless)
        part = b"\r\nc: d" if endless.endswith(b"b") else b"x" * 5
        writer.write(part * ((LIMIT + REQUEST_LINE_BYTES) // 5 + 1))
        line, error = await rest(reader)
        assert line == b"HTTP/1.1 431 Request Header Fields Too Large"
        assert error["code"] == "headers_too_large"


async def test_the_body_of_a_request_that_was_answered_does_not_come_for_ever() -> None:
    async with connected(0.3) as (reader, writer), asyncio.timeout(60):
        writer.write(b"POST /refused HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\nx")
        assert b"ok" in await reader.readuntil(b"ok")
        end = asyncio.ensure_future(reader.read())
        while not end.done():
            writer.write(b"x")
            await asyncio.sleep(0.02)


async def test_a_body_that_comes_after_its_answer_costs_no_connection() -> None:
    async with connected(60) as (reader, writer), asyncio.timeout(60):
        for _ in range(2):
            writer.write(b"POST /refused HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nx")
            assert b"ok" in await reader.readuntil(b"ok")
            writer.write(b"x")


async def test_what_is_no_http_is_told_so() -> None:
    async with connected(60) as (reader, writer):
        writer.write(b"\x16\x03\x01\x02\x00")
        line, error = await rest(reader)
        assert line == b"HTTP/1.1 400 Bad Request"
        assert error["code"] == "invalid_request"


async def test_a_body_and_an_idle_connection_take_their_time() -> None:
    request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"
    async with connected(0.2) as (reader, writer), asyncio.timeout(60):
        for _ in range(2):
            writer.write(request)
            await asyncio.sleep(0.4)
            writer.write(b"{}")
            await reader.readuntil(b"ok")
            await asyncio.sleep(0.4)
