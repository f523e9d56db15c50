"""A fake engine, fake tables, a fake router, and the real gateway over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import openai
import pytest
import uvicorn
from aiohttp import web
from fastapi import FastAPI
from starlette.types import ASGIApp

from configs import RunConfig
from configs.schema import GatewayConfig
from router.conversation import Message
from router.types import Candidate, Route
from server.engine_slots import FILL_PATH
from server.gateway.app import create_app
from server.gateway.heads import protocol_for
from server.gateway.parts import ALONE
from server.gateway.routing import LoadedRouter, RouterSource
from server.gateway.seat import Seat
from server.table import ExpertHome, RoutingTable, WorkerEntry

BASE = "small-base"
SPORT = "expert-0000@aaaaaaaaaaaa"
LAW = "expert-0001@bbbbbbbbbbbb"


@dataclass
class Seen:
    """One request as the fake engine saw it."""

    path: str
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


@dataclass
class FakeEngine:
    """Answers like vLLM, in the name of the adapter it was asked for, and misbehaves on demand."""

    name: str = "engine"
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    filled: list[list[str]] = field(default_factory=list)
    """The adapters that it was told to have in its slots, call by call."""
    behaviour: str = "answer"
    """`answer`, `wait` (never), `die` (before the head), `die_in_stream`, `die_in_event`,
    `die_in_body`, or `error`."""
    error: tuple[int, dict[str, Any]] = (400, {})
    tokens: int = 3
    token_delay_s: float = 0.0
    first_token_only: asyncio.Event | None = None
    """The other tokens of a stream come once this is set; none: at once."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a client went away before its answer was complete."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> FakeEngine:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        bound = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{bound}"
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        if request.path == FILL_PATH:
            self.filled.append(json.loads(body)["lora_names"])
            return web.json_response({})
        self.seen.append(Seen(request.path, body, headers))
        self.arrived.set()
        try:
            return await self._answer(request, json.loads(body))
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        if self.behaviour == "wait":
            await asyncio.sleep(3600)
        if self.behaviour == "die":
            request.transport.abort()
            return web.Response()
        if self.behaviour == "error":
            return web.json_response(self.error[1], status=self.error[0])
        if body.get("stream"):
            return await self._stream(request, body)
        if self.behaviour == "die_in_body":
            response = web.StreamResponse(headers={"content-length": "1000"})
            await response.prepare(request)
            await response.write(b'{"half"')
            request.transport.abort()
            return response
        return web.json_response(_answer_to(request.path, body), headers={"x-engine": self.name})

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for number in range(self.tokens):
            chunk = _chunk(request.path, body["model"], f"t{number} ")
            event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
            if number == 1 and self.behaviour == "die_in_stream":
                await asyncio.sleep(0.05)
                request.transport.abort()
                return response
            if number == 1 and self.behaviour == "die_in_event":
                await response.write(event[: len(event) // 2])
                await asyncio.sleep(0.05)
                request.transport.abort()
                return response
            await response.write(event)
            if number == 0 and self.first_token_only is not None:
                await self.first_token_only.wait()
            await asyncio.sleep(self.token_delay_s)
        await response.write(b"data: [DONE]\n\n")
        return response


def _answer_to(path: str, body: dict[str, Any]) -> dict[str, Any]:
    model = body["model"]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    if path == "/v1/completions":
        choice = {"index": 0, "text": f"by {model}", "finish_reason": "stop", "logprobs": None}
        kind = "text_completion"
    else:
        message = {"role": "assistant", "content": f"by {model}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        kind = "chat.completion"
    return {
        "id": "x",
        "object": kind,
        "created": 1,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def _chunk(path: str, model: str, text: str) -> dict[str, Any]:
    if path == "/v1/completions":
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": None}
        kind = "text_completion"
    else:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        kind = "chat.completion.chunk"
    return {"id": "x", "object": kind, "created": 1, "model": model, "choices": [choice]}


class FakeTables:
    """A table source that a test feeds."""

    def __init__(self, *tables: RoutingTable) -> None:
        self._queue: asyncio.Queue[RoutingTable] = asyncio.Queue()
        for table in tables:
            self.publish(table)

    def publish(self, table: RoutingTable) -> None:
        self._queue.put_nowait(table)

    async def follow(self) -> AsyncIterator[RoutingTable]:
        while True:
            yield await self._queue.get()


class FakeRouter:
    """Routes by the word in the text: `sport`, `law`, `unserved`; else it abstains."""

    threshold = 0.25
    words = MappingProxyType(
        {"sport": "expert-0000", "law": "expert-0001", "unserved": "expert-0009"}
    )

    def __init__(self) -> None:
        self.batches: list[int] = []

    def quick_routes(self, conversations: Sequence[Sequence[Message]]) -> list[Route | None]:
        return [None] * len(conversations)

    def route_conversations(self, conversations: Sequence[Sequence[Message]]) -> list[Route]:
        self.batches.append(len(conversations))
        return [self._route(messages[-1].text) for messages in conversations]

    def _route(self, text: str) -> Route:
        for cluster, (word, expert) in enumerate(self.words.items()):
            if word in text:
                top = (Candidate(expert, 0.75), Candidate("expert-0001", 0.5))
                return Route(expert, cluster, 0.75, 0.25, False, top)
        return Route(None, 0, 0.125, 0.0, True, (Candidate("expert-0000", 0.125),))


def make_worker(
    number: int, url: str | None, experts: Sequence[str], **changes: Any
) -> WorkerEntry:
    fields: dict[str, Any] = {
        "id": f"worker-{number}",
        "state": "ready",
        "url": url,
        "node": "127.0.0.1",
        "devices": f"cores:{number}",
        "engine": "vllm 0.32.0",
        "pid": 1,
        "experts": list(experts),
        "restarts": 0,
        "detail": "",
    }
    return WorkerEntry(**{**fields, **changes})


def make_table(version: int, *workers: WorkerEntry, **changes: Any) -> RoutingTable:
    """Both experts are placed; which of the workers holds which is said by the workers."""
    homes = [
        ExpertHome(
            id=name.partition("@")[0],
            version=name.partition("@")[2],
            served_name=name,
            cluster=cluster,
            workers=[worker.id for worker in workers if name in worker.experts],
        )
        for cluster, name in enumerate((SPORT, LAW))
    ]
    fields: dict[str, Any] = {
        "version": version,
        "bundle": "cccccccccccc",
        "base_name": BASE,
        "max_model_len": 128,
        "workers": list(workers),
        "experts": homes,
    }
    return RoutingTable(**{**fields, **changes})


def make_config(scratch: Path | None = None, **gateway: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "bundle": {"path": "bundle", "scratch_dir": str(scratch) if scratch else None},
            "base": {"model": BASE},
            "data": {"train": ["x.jsonl"]},
            "gateway": {"port": 0, "max_body_bytes": 65536, "retry_after_s": 1, **gateway},
        }
    )


class _Server(uvicorn.Server):
    """A server inside the test's own event loop, which leaves the signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def connection_to(
    application: ASGIApp, config: GatewayConfig
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of an application of one's own, as the gateway would serve it."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = _Server(
        uvicorn.Config(
            application,
            http=protocol_for(config),
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        try:
            yield reader, writer
        finally:
            writer.close()
    finally:
        server.should_exit = True
        await task


@dataclass
class Gateway:
    """A running gateway."""

    url: str
    tables: FakeTables
    http: aiohttp.ClientSession

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options}
        )

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any, Any]:
        """Status, JSON and headers of an answer; `body` is bytes or becomes JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=data, **options) as response:
            return response.status, await response.json(content_type=None), response.headers

    async def get(self, path: str) -> tuple[int, Any, Any]:
        async with self.http.get(self.url + path) as response:
            return response.status, await response.json(content_type=None), response.headers

    async def metric(self, name: str) -> float:
        """Value of a sample by its name and labels; 0 where it is not there yet."""
        async with self.http.get(f"{self.url}/metrics") as response:
            for line in (await response.text()).splitlines():
                if line.startswith(name + " "):
                    return float(line.rpartition(" ")[2])
        return 0.0

    async def counts(self, sample: str) -> None:
        """Wait until a counter has counted."""
        async with asyncio.timeout(60):
            while await self.metric(sample) == 0:  # noqa: ASYNC110 - it is counted elsewhere
                await asyncio.sleep(0.01)

    async def uses(self, table: RoutingTable) -> None:
        """Publish a table and wait until it is in use."""
        self.tables.publish(table)
        await self.until(
            "/admin/status", lambda s: bool(s["table"]) and s["table"]["version"] == table.version
        )

    async def until(self, path: str, holds: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(60):
            while True:
                _, answer, _ = await self.get(path)
                if holds(answer):
                    return answer
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Serve an application on a free port; the URL."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = uvicorn.Config(
        app,
        http=protocol_for(GatewayConfig()),
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=0,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started:  # uvicorn has no event for it
            if task.done():
                task.result()
                raise AssertionError("the server ended before it had started")
            await asyncio.sleep(0.005)
        yield url
    finally:
        server.should_exit = True
        await task


def refuse(table: RoutingTable, served_name: str) -> RoutingTable:
    """The table as it is when the homes of an expert have refused it."""
    workers = [
        worker.model_copy(
            update={
                "experts": [e for e in worker.experts if e != served_name],
                "refused": {served_name: "refused for a test"},
            }
        )
        for worker in table.workers
    ]
    return table.model_copy(update={"workers": workers, "version": table.version + 1})


StartGateway = Callable[..., Awaitable[Gateway]]
StartEngine = Callable[..., Awaitable[FakeEngine]]


@pytest.fixture
async def start_engine() -> AsyncIterator[StartEngine]:
    """Starts fake engines that are stopped after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**fields: Any) -> FakeEngine:
            engine = await FakeEngine(**fields).start()
            stack.push_async_callback(engine.stop)
            return engine

        yield start


@pytest.fixture
def nowhere() -> Iterator[str]:
    """URL at which nobody listens, nor anybody can while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
async def start_gateway(tmp_path: Path) -> AsyncIterator[StartGateway]:
    """Starts gateways that are stopped after the test; waits until their first table is in use.
    All have the test's own directory for scratch."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            *tables: RoutingTable,
            router: RouterSource | None = None,
            seat: Seat = ALONE,
            **options: Any,
        ) -> Gateway:
            def loads(place: str) -> LoadedRouter:
                return LoadedRouter(router=FakeRouter(), bundle="cccccccccccc")

            source = FakeTables(*tables)
            app = create_app(make_config(tmp_path, **options), source, router or loads, seat)
            url = await stack.enter_async_context(serving(app))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            gateway = Gateway(url, source, http)
            if tables:
                await gateway.until("/admin/status", lambda status: status["table"] is not None)
            if tables and router is None:
                await gateway.until("/admin/status", lambda s: s["router"]["state"] == "ready")
            return gateway

        yield start


@dataclass
class House:
    """Two engines with one expert each, and a gateway before them."""

    gateway: Gateway
    sport: FakeEngine
    law: FakeEngine


@pytest.fixture
async def house(start_engine: StartEngine, start_gateway: StartGateway) -> House:
    sport = await start_engine(name="sport")
    law = await start_engine(name="law")
    table = make_table(1, make_worker(0, sport.url, [SPORT]), make_worker(1, law.url, [LAW]))
    gateway = await start_gateway(table, queue_timeout_s=0.3, affinity_slack=0)
    return House(gateway, sport, law)


def chat(model: str, text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}
