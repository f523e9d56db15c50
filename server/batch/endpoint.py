"""A running gateway as whoever answers: asked at low priority, so that live traffic goes first.

Lines are routed by the gateway's own `/v1/route`, and asked by the served name that it says: so
they are grouped by expert, and answered by the version that they were routed for while that is
served, then by the expert's next.
Knows nothing of engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from router.conversation import routing_text
from server.batch.errors import BatchError, LaneLostError, LineError
from server.batch.requests import ROUTE_PATH
from server.batch.results import BASE
from server.batch.types import Answer, Decision, Line, Seat, Task
from server.table import ROUTED_MODEL

LANE = "gateway"
PRIORITY = {"x-introvert-priority": "batch"}
GROUPS = 8
"""Experts that are asked for at the same time, so that all workers have something to do."""
TEXTS = 64
"""Of one question to `/v1/route`."""
PATIENCE_S = 120.0
"""Without an answer from the gateway, before the job gives up for now."""
PAUSE_S = 0.5
LATER = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)


class EndpointBackend:
    """A gateway by its URL; an async context manager."""

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 32,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 3600.0,
    ) -> None:
        """Describe it; nothing is asked yet.

        Args:
            url: root of the gateway's API, without `/v1`.
            concurrency: lines in hand at the most; the gateway lets in fewer where it is busy.
            headers: such as the API key.
            timeout_s: longest that one line may take.
        """
        self._url = url.rstrip("/")
        self._headers = {**PRIORITY, "content-type": "application/json", **(headers or {})}
        self._timeout_s = timeout_s
        groups = min(GROUPS, concurrency)
        self.seats = tuple(Seat(LANE, f"group-{i % groups}", 1) for i in range(concurrency))
        self._http: aiohttp.ClientSession | None = None
        self._heard = 0.0

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=5),
            headers=self._headers,
        )
        self._heard = asyncio.get_running_loop().time()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._http, "it has been entered"
        await self._http.close()

    def holds(self, lane: str) -> frozenset[str] | None:
        """The gateway knows where everything is."""
        return None

    async def decide(self, tasks: Sequence[Task]) -> Sequence[Decision | LineError]:
        """Routed lines go where the gateway says, named ones where they say themselves."""
        found: list[Decision | LineError] = [Decision(task.model) for task in tasks]
        texts: dict[str, list[int]] = {}
        chats = []
        for place, task in enumerate(tasks):
            if task.path == ROUTE_PATH:
                found[place] = Decision(ROUTED_MODEL)
            elif task.model == ROUTED_MODEL and len(task.messages) == 1:
                texts.setdefault(routing_text(task.messages, "conversation"), []).append(place)
            elif task.model == ROUTED_MODEL:
                chats.append(place)
        unique = list(texts)
        blocks = [unique[i : i + TEXTS] for i in range(0, len(unique), TEXTS)]
        for block in blocks:
            routes = await self._explain({"input": block}, len(block))
            for text, decision in zip(block, routes, strict=True):
                for place in texts[text]:
                    found[place] = decision
        for place in chats:
            messages = [{"role": m.role, "content": m.text} for m in tasks[place].messages]
            (found[place],) = await self._explain({"messages": messages}, 1)
        return found

    async def ask(self, lane: str, lines: Sequence[Line]) -> AsyncIterator[Answer]:
        """Ask lines one after another."""
        assert self._http, "it has been entered"
        for line in lines:
            try:
                async with self._http.post(self._url + line.path, data=_body(line)) as response:
                    content, headers = await response.read(), response.headers
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                raise LaneLostError(str(error), reached=False) from None
            except (aiohttp.ClientError, TimeoutError) as error:
                raise LaneLostError(str(error) or type(error).__name__) from None
            self._heard = asyncio.get_running_loop().time()
            if response.status in LATER:
                yield Answer(line.number, response.status, content, again=True)
            elif response.status == HTTPStatus.NOT_FOUND and "@" in line.target and line.turns < 3:
                # that version is not served any more: the expert's next one answers
                line.target, line.turns = line.target.partition("@")[0], line.turns + 1
                yield Answer(line.number, response.status, content, again=True)
            elif response.status in (HTTPStatus.UNAUTHORIZED,):
                raise BatchError(f"{self._url} refuses the batch: {_message(content)}")
            elif line.path == ROUTE_PATH and response.status == HTTPStatus.OK:
                route = msgspec.json.decode(content)["data"][0]
                expert = route["expert"] or BASE
                yield Answer(line.number, response.status, content, expert, None, route["score"])
            else:
                yield Answer(
                    line.number,
                    response.status,
                    content,
                    expert=headers.get("x-introvert-expert"),
                    version=_known(headers.get("x-introvert-expert-version")),
                )

    async def refresh(self, remaining: Mapping[str, int]) -> Mapping[str, str]:
        """See that the gateway has answered of late.

        Raises:
            BatchError: it has not.
        """
        if asyncio.get_running_loop().time() - self._heard > PATIENCE_S:
            assert self._http, "it has been entered"
            try:
                async with self._http.get(f"{self._url}/health") as response:
                    await response.read()
                self._heard = asyncio.get_running_loop().time()
            except (aiohttp.ClientError, TimeoutError) as error:
                raise BatchError(
                    f"no endpoint answers at {self._url} ({error}); start it and give the same "
                    "command again: what is finished stands"
                ) from None
        return {}

    async def _explain(self, body: Mapping[str, Any], count: int) -> list[Decision | LineError]:
        """Routes of some texts or of one chat, waited for while the gateway is not ready."""
        assert self._http, "it has been entered"
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            reason, status = "", 0
            try:
                async with self._http.post(
                    self._url + ROUTE_PATH, data=msgspec.json.encode(body)
                ) as response:
                    content, status = await response.read(), response.status
                    if status == HTTPStatus.OK:
                        self._heard = asyncio.get_running_loop().time()
                        return [_decision(r) for r in msgspec.json.decode(content)["data"]]
                    reason = _message(content)
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
            if status and status not in LATER:
                if status == HTTPStatus.UNAUTHORIZED:
                    raise BatchError(f"{self._url} refuses the batch: {reason}")
                return [LineError("unroutable", reason)] * count
            if asyncio.get_running_loop().time() > deadline:
                raise BatchError(
                    f"no endpoint routes at {self._url} ({reason}); see that `introvert serve` "
                    "runs there, and give the same command again"
                )
            await asyncio.sleep(PAUSE_S)


def _decision(route: Mapping[str, Any]) -> Decision:
    return Decision(str(route["model"]), float(route["score"]))


def _body(line: Line) -> bytes:
    """The line's body with its model put in."""
    if line.path == ROUTE_PATH:
        return line.body
    rest = line.body[1:]
    comma = b"," if rest != b"}" else b""
    return b'{"model":' + msgspec.json.encode(line.target) + comma + rest


def _known(version: str | None) -> str | None:
    return None if version == "none" else version


def _message(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
