"""Blocks of lines to engines that are stubs, by a table that the test writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from configs.manifest import BaseEntry
from router.conversation import Message
from router.types import Candidate, Route
from server.batch import own
from server.batch.errors import BatchError, LaneLostError, LineError
from server.batch.own import OwnBackend
from server.batch.types import Decision, Line, Task
from server.engine_host import LINES_PATH
from server.table import RoutingTable, WorkerEntry


class Manifest:
    """A manifest as far as the backend reads it."""

    base = BaseEntry(name="tiny", model="tiny", digest="0" * 64)

    class _Entry:
        def __init__(self, number: int) -> None:
            self.id, self.version = f"expert-{number:04}", "abc"

    served = (_Entry(0), _Entry(1))


class WordRouter:
    """`one` goes to expert-0001, `zero` to expert-0000, all else to nobody."""

    def route_conversations(
        self, conversations: Sequence[Sequence[Message]], *, sure_only: bool = True
    ) -> list[Route]:
        places = {"zero": 0, "one": 1}
        found = []
        for (message,) in conversations:
            place = places.get(message.text)
            expert = None if place is None else f"expert-{place:04}"
            top = (Candidate(f"expert-{place or 0:04}", 0.5),)
            found.append(Route(expert, place or 0, 0.5, 0.1, expert is None, top))
        return found


def worker(number: int, url: str | None, **more: object) -> WorkerEntry:
    fields = {
        "id": f"worker-{number}",
        "state": "ready",
        "url": url,
        "node": "127.0.0.1",
        "devices": "cores:0",
        "engine": "stub",
        "pid": 1,
        "experts": ["expert-0000@abc"],
        "restarts": 0,
        "detail": "",
    }
    return WorkerEntry.model_validate({**fields, **more})


class Stand:
    """A backend, the table that it follows, and what it told the control plane."""

    def __init__(self) -> None:
        self.workers: list[WorkerEntry] = []
        self.demands: list[Mapping[str, float]] = []
        self.backend = OwnBackend(
            Manifest(),  # type: ignore[arg-type]
            WordRouter(),
            table=self.table,
            demand=self.demands.append,
            engine_key="secret",
        )

    def table(self) -> RoutingTable:
        return RoutingTable.model_construct(workers=self.workers)


@asynccontextmanager
async def engine(lines_answered: int | None = None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A stub that answers each line, or so many of a block before it goes away."""
    blocks: list[bytes] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == "Bearer secret"
        blocks.append(await request.read())
        response = web.StreamResponse()
        await response.prepare(request)
        for count, raw in enumerate(blocks[-1].split(b"\n")):
            if count == lines_answered:
                assert request.transport
                request.transport.abort()
                return response
            line = json.loads(raw)
            status = 404 if line["body"].get("gone") else 200
            body = {"model": line["body"]["model"], "path": line["path"]}
            reply = json.dumps({"id": line["id"], "status": status, "body": body})
            await response.write(reply[:9].encode())
            await response.write(reply[9:].encode() + b"\n")
        return response

    app = web.Application()
    app.router.add_post(LINES_PATH, answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        yield f"http://127.0.0.1:{port}", blocks
    finally:
        await runner.cleanup()


def line(number: int, body: bytes = b'{"prompt":"x"}', target: str = "expert-0000@abc") -> Line:
    return Line(number, 0, number, f"id-{number}", "/v1/completions", target, body, None)


def task(model: str, text: str = "zero", path: str = "/v1/completions") -> Task:
    return Task("id", path, model, b"{}", (Message("user", text),))


async def test_lines_are_decided_by_meaning_or_by_name() -> None:
    backend = Stand().backend
    tasks = [
        task("introvert", "one"),
        task("introvert", "neither"),
        task("expert-0000"),
        task("expert-0000@abc"),
        task("tiny"),
        task("nobody"),
        task("introvert", "one", "/v1/route"),
    ]
    found = await backend.decide(tasks)
    assert found[0] == Decision("expert-0001@abc", 0.5)
    assert found[1] == Decision("tiny", 0.5)
    assert found[2] == found[3] == Decision("expert-0000@abc")
    assert found[4] == Decision("tiny")
    assert isinstance(found[5], LineError)
    assert isinstance(found[6], Decision)
    assert json.loads(found[6].answer or b"")["data"][0]["expert"] == "expert-0001"


async def test_a_block_is_answered_line_by_line() -> None:
    stand = Stand()
    async with engine() as (url, blocks), stand.backend as backend:
        stand.workers = [worker(0, url), worker(1, None, state="down", experts=[])]
        await backend.refresh({})
        assert {seat.lane for seat in backend.seats} == {"worker-0"}
        assert backend.holds("worker-0") == {"expert-0000@abc", "tiny"}
        assert backend.holds("worker-1") == frozenset()
        lines = [line(1), line(2, b"{}", "tiny"), line(3, b'{"gone":true}')]
        answers = [answer async for answer in backend.ask("worker-0", lines)]
    assert [json.loads(answer.body)["model"] for answer in answers[:2]] == [
        "expert-0000@abc",
        "tiny",
    ]
    assert [(a.number, a.status, a.again) for a in answers] == [
        (1, 200, False),
        (2, 200, False),
        (3, 404, True),
    ]
    assert answers[1].expert == "base"
    assert len(blocks) == 1


async def test_an_engine_that_goes_away_keeps_what_it_answered() -> None:
    stand = Stand()
    async with engine(lines_answered=2) as (url, _), stand.backend as backend:
        stand.workers = [worker(0, url)]
        await backend.refresh({})
        answers = backend.ask("worker-0", [line(n) for n in range(1, 6)])
        assert [(await anext(answers)).number for _ in range(2)] == [1, 2]
        with pytest.raises(LaneLostError) as lost:
            await anext(answers)
        assert lost.value.reached
        with pytest.raises(LaneLostError) as lost:
            await anext(backend.ask("worker-9", [line(1)]))
        assert not lost.value.reached


async def test_an_engine_that_is_gone_never_had_the_lines() -> None:
    stand = Stand()
    async with engine() as (url, _):
        stand.workers = [worker(0, url)]
    async with stand.backend as backend:
        await backend.refresh({})
        with pytest.raises(LaneLostError) as lost:
            await anext(backend.ask("worker-0", [line(1)]))
        assert not lost.value.reached


async def test_the_control_plane_is_told_what_is_left() -> None:
    stand = Stand()
    async with stand.backend as backend:
        stand.workers = [worker(0, "http://x"), worker(1, "http://y")]
        await backend.refresh({"expert-0000@abc": 30, "expert-0001@abc": 10, "tiny": 0})
        await backend.refresh({"expert-0000@abc": 30})
    assert stand.demands == [{"expert-0000": 1.5, "expert-0001": 0.5}]


async def test_an_expert_that_is_refused_for_long_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own, "REFUSED_S", 0.02)
    stand = Stand()
    async with stand.backend as backend:
        stand.workers = [worker(0, "http://x", refused={"expert-0001@abc": "it is swapped"})]
        assert await backend.refresh({"expert-0001@abc": 3}) == {}
        await asyncio.sleep(0.05)
        assert await backend.refresh({"expert-0001@abc": 3}) == {"expert-0001@abc": "it is swapped"}
        stand.workers = [*stand.workers, worker(1, "http://y", experts=["expert-0001@abc"])]
        assert await backend.refresh({"expert-0001@abc": 3}) == {}


async def test_a_job_whose_engines_have_all_failed_says_so() -> None:
    stand = Stand()
    async with stand.backend as backend:
        stand.workers = [worker(0, None, state="failed", detail="out of memory")]
        with pytest.raises(BatchError, match="out of memory"):
            await backend.refresh({"tiny": 1})
