"""A gateway that is a stub: what it is asked, and what becomes of its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from router.conversation import Message
from server.batch import endpoint
from server.batch.endpoint import EndpointBackend
from server.batch.errors import BatchError, LaneLostError, LineError
from server.batch.types import Answer, Decision, Line, Task


class Gateway:
    """Routes by the first word; answers with the model; `busy` says how often it refuses."""

    def __init__(self) -> None:
        self.busy = 0
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.url = ""

    async def route(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append((request.path, body))
        if self.busy:
            self.busy -= 1
            return web.json_response({"error": {"message": "loading"}}, status=503)
        texts = body.get("input") or [body["messages"][-1]["content"]]
        routes = [{"model": f"expert-{t.split()[0]}@v1", "score": 0.5, "expert": t} for t in texts]
        return web.json_response({"data": routes})

    async def complete(self, request: web.Request) -> web.Response:
        assert request.headers["x-introvert-priority"] == "batch"
        body = await request.json()
        self.asked.append((request.path, body))
        if self.busy:
            self.busy -= 1
            return web.json_response({"error": {"message": "yielding"}}, status=429)
        status = {"expert-old@v1": 404, "forbidden": 401}.get(body["model"], 200)
        headers = {"x-introvert-expert": "expert-red", "x-introvert-expert-version": "v2"}
        return web.json_response({"model": body["model"]}, status=status, headers=headers)


@asynccontextmanager
async def gateway() -> AsyncIterator[Gateway]:
    stub = Gateway()
    app = web.Application()
    app.router.add_post("/v1/route", stub.route)
    app.router.add_post("/v1/completions", stub.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        stub.url = f"http://127.0.0.1:{port}"
        yield stub
    finally:
        await runner.cleanup()


def task(model: str, *texts: str, path: str = "/v1/completions") -> Task:
    return Task("id", path, model, b"{}", tuple(Message("user", text) for text in texts))


def line(target: str, body: bytes = b'{"prompt":"x"}', path: str = "/v1/completions") -> Line:
    return Line(1, 0, 1, "id", path, target, body, 0.5)


async def one(backend: EndpointBackend, asked: Line) -> Answer:
    (answer,) = [answer async for answer in backend.ask("gateway", [asked])]
    return answer


async def test_texts_are_routed_together_and_each_once() -> None:
    async with gateway() as stub, EndpointBackend(stub.url) as backend:
        tasks = [
            task("introvert", "red 1"),
            task("introvert", "blue"),
            task("introvert", "red 1"),
            task("expert-0001"),
            task("introvert", "first", "green turn"),
        ]
        found = await backend.decide(tasks)
        assert [d.target for d in found if isinstance(d, Decision)] == [
            "expert-red@v1",
            "expert-blue@v1",
            "expert-red@v1",
            "expert-0001",
            "expert-green@v1",
        ]
        assert [body for _, body in stub.asked if "input" in body] == [{"input": ["red 1", "blue"]}]


async def test_a_gateway_that_is_not_ready_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSE_S", 0.001)
    async with gateway() as stub, EndpointBackend(stub.url) as backend:
        stub.busy = 3
        assert await backend.decide([task("introvert", "red")]) == [Decision("expert-red@v1", 0.5)]
        monkeypatch.setattr(endpoint, "PATIENCE_S", 0.01)
        stub.busy = 10**6
        with pytest.raises(BatchError, match="loading"):
            await backend.decide([task("introvert", "red")])


async def test_an_answer_tells_who_gave_it() -> None:
    async with gateway() as stub, EndpointBackend(stub.url) as backend:
        answer = await one(backend, line("expert-red@v2"))
        assert (answer.status, answer.expert, answer.version) == (200, "expert-red", "v2")
        assert stub.asked[-1][1] == {"model": "expert-red@v2", "prompt": "x"}
        route = await one(backend, line("introvert", b'{"input":["red"]}', "/v1/route"))
        assert (route.expert, route.score) == ("red", 0.5)


async def test_lines_that_the_gateway_puts_off_come_again() -> None:
    async with gateway() as stub, EndpointBackend(stub.url) as backend:
        stub.busy = 1
        assert (await one(backend, line("expert-red@v2"))).again
        old = line("expert-old@v1")
        assert (await one(backend, old)).again
        assert old.target == "expert-old"


async def test_a_key_that_is_refused_ends_the_job() -> None:
    async with gateway() as stub, EndpointBackend(stub.url) as backend:
        with pytest.raises(BatchError, match="refuses"):
            await one(backend, line("forbidden"))


async def test_a_gateway_that_is_gone_is_lost_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with gateway() as stub:
        url = stub.url
    async with EndpointBackend(url) as backend:
        with pytest.raises(LaneLostError) as lost:
            await one(backend, line("expert-red@v2"))
        assert not lost.value.reached, "nobody can have had the line"
        assert await backend.refresh({}) == {}
        monkeypatch.setattr(endpoint, "PATIENCE_S", 0.0)
        with pytest.raises(BatchError, match="no endpoint answers"):
            await backend.refresh({})


async def test_what_cannot_be_routed_is_that_lines_error() -> None:
    async with gateway() as stub, EndpointBackend(f"{stub.url}/nowhere") as backend:
        (found,) = await backend.decide([task("introvert", "red")])
        assert isinstance(found, LineError)
