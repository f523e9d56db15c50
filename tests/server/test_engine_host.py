"""Lines in, lines out: with handlers of the test's own in place of vLLM's."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from server.engine_host import LINES_PATH, BatchLines, EngineEndedError, Message, Outcome


class Engine:
    """Answers in the order of the bodies' `wait`; `die` ends it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []

    async def complete(self, body: Mapping[str, Any]) -> Outcome:
        self.begun.append(body["name"])
        try:
            await asyncio.sleep(body.get("wait", 0))
        except asyncio.CancelledError:
            self.cancelled.append(body["name"])
            raise
        if body.get("die"):
            raise EngineEndedError
        return body.get("status", 200), json.dumps({"name": body["name"]}).encode()


async def call(
    engine: Engine, body: bytes, *, method: str = "POST", gone: asyncio.Event | None = None
) -> list[Message]:
    """What the middleware sends for one call, whose client may hang up."""
    sent: list[Message] = []
    waiting = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        if (message := next(waiting, None)) is not None:
            return message
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        sent.append({"type": "passed on"})

    lines = BatchLines(app, {"/v1/completions": engine.complete})
    async with asyncio.timeout(60):
        await lines({"type": "http", "path": LINES_PATH, "method": method}, receive, send)
    return sent


def ask(number: int, **body: Any) -> bytes:
    line = {"id": number, "path": "/v1/completions", "body": {"name": f"n{number}", **body}}
    return json.dumps(line).encode()


def answers(sent: list[Message]) -> dict[int, tuple[int, Any]]:
    text = b"".join(m.get("body", b"") for m in sent)
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["id"]: (row["status"], row["body"]) for row in rows}


async def test_lines_begin_in_order_and_are_answered_as_they_are_done() -> None:
    engine = Engine()
    sent = await call(engine, b"\n".join([ask(1, wait=0.05), ask(2), ask(3, status=400)]))
    assert engine.begun == ["n1", "n2", "n3"]
    found = answers(sent)
    assert found == {1: (200, {"name": "n1"}), 2: (200, {"name": "n2"}), 3: (400, {"name": "n3"})}
    assert list(found)[-1] == 1
    assert sent[0]["status"] == 200
    assert [m.get("more_body", False) for m in sent[1:]][-1] is False


async def test_a_line_that_cannot_be_asked_disturbs_nobody() -> None:
    lines = [
        b'{"id": 1, "path": "/v1/embeddings", "body": {}}',
        ask(2, stream=True),
        b"",
        ask(3),
    ]
    found = answers(await call(Engine(), b"\n".join(lines)))
    assert {number: status for number, (status, _) in found.items()} == {1: 404, 2: 400, 3: 200}
    assert "stream" in found[2][1]["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b'{"id": "x"}', b"[]"])
async def test_a_call_that_is_no_lines_is_refused(body: bytes) -> None:
    assert (await call(Engine(), body))[0]["status"] == 400


async def test_an_empty_call_has_an_empty_answer() -> None:
    sent = await call(Engine(), b"")
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"]


async def test_what_a_client_that_hangs_up_has_asked_is_given_up() -> None:
    engine, gone = Engine(), asyncio.Event()
    asking = asyncio.create_task(call(engine, ask(1, wait=60), gone=gone))
    while not engine.begun:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    gone.set()
    await asking
    assert engine.cancelled == ["n1"]


async def test_an_engine_that_dies_breaks_off_its_answer() -> None:
    engine = Engine()
    sent = await call(engine, b"\n".join([ask(1), ask(2, wait=0.05, die=True), ask(3, wait=60)]))
    assert answers(sent) == {1: (200, {"name": "n1"})}
    assert sent[-1]["more_body"] is True
    assert engine.cancelled == ["n3"]


async def test_all_else_is_the_applications() -> None:
    assert await call(Engine(), b"", method="GET") == [{"type": "passed on"}]


HOST = """
import sys, threading, time, types

class Core:
    scheduler = types.SimpleNamespace(has_requests=lambda: True)

class InprocClient:
    engine_core = Core()
    def __init__(self, *_):
        pass
    def get_output(self):
        threading.Thread(target=client.shutdown, kwargs={"timeout": 0}).start()
        time.sleep(60)
        raise AssertionError("the step went on")
    def add_request(self, request): ...
    def abort_requests(self, request_ids): ...
    def shutdown(self, timeout=None):
        print("taken down", flush=True)

class EngineCoreClient:
    async def add_request_async(self, request): ...

module = types.ModuleType("vllm.v1.engine.core_client")
module.InprocClient, module.EngineCoreClient = InprocClient, EngineCoreClient
sys.modules |= {"vllm": types.ModuleType("vllm"), "vllm.v1": types.ModuleType("vllm.v1"),
    "vllm.v1.engine": types.ModuleType("vllm.v1.engine"), module.__name__: module}

import asyncio
from server.engine_host import compute_in_process

compute_in_process()
client = EngineCoreClient.make_async_mp_client(vllm_config=0, executor_class=0, log_stats=False)
if sys.argv[1] == "told to end":
    asyncio.run(client.get_output_async())
client.shutdown()
"""


@pytest.mark.parametrize(("how", "said"), [("told to end", ""), ("by itself", "taken down\n")])
def test_an_engine_that_is_told_to_end_ends_in_the_middle_of_a_step(how: str, said: str) -> None:
    """One that ends by itself is taken down as vLLM does it, and so tells what was wrong."""
    done = subprocess.run(
        [sys.executable, "-c", HOST, how],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
