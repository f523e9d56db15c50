from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine_slots import FILL_PATH, MOST_BYTES, SlotFiller


class Engine:
    """What the middleware needs of vLLM's application."""

    def __init__(self, *loaded: str, fails: bool = False) -> None:
        self.used: list[str] = []
        self._fails = fails
        requests = {name: f"request of {name}" for name in loaded}
        self.app = SimpleNamespace(
            state=SimpleNamespace(
                openai_serving_models=SimpleNamespace(lora_requests=requests), engine_client=self
            )
        )

    async def add_lora(self, request: str) -> bool:
        if self._fails:
            raise RuntimeError("the engine is dead")
        self.used.append(request.removeprefix("request of "))
        return True


async def ask(
    engine: Engine,
    *parts: bytes,
    path: str = FILL_PATH,
    method: str = "POST",
    kind: str = "http",
    hangs_up: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer; 0 where the application was asked instead."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": hangs_up or number < len(parts)}
        for number, part in enumerate(parts, 1)
    ]
    messages.append({"type": "http.disconnect"})
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "inside"})

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "app": engine.app}
    await SlotFiller(app)(scope, receive, send)
    if sent == [{"type": "inside"}]:
        return 0, {}
    start, body = sent
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    return start["status"], json.loads(body["body"])


def body_of(*names: str) -> bytes:
    return json.dumps({"lora_names": names}).encode()


async def test_adapters_are_used_in_the_order_given() -> None:
    engine = Engine("a", "b", "c")
    body = body_of("c", "a")
    assert await ask(engine, body[:5], body[5:]) == (200, {})
    assert engine.used == ["c", "a"]


async def test_what_is_not_loaded_is_named_and_nothing_is_touched() -> None:
    engine = Engine("a")
    status, answer = await ask(engine, body_of("a", "../../etc"))
    assert (status, engine.used) == (404, [])
    assert "../../etc" in answer["error"]["message"]


async def test_of_those_to_be_kept_what_is_gone_is_passed_over() -> None:
    engine = Engine("a", "b")
    assert await ask(engine, body_of("b", "gone", "a")) == (200, {})
    assert engine.used == ["b", "a"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"lora_names": "a"}',
        b'{"lora_names": []}',
        b'{"lora_names": [1]}',
        b"[" * 10_000,
    ],
)
async def test_what_is_no_list_of_names_is_refused(body: bytes) -> None:
    engine = Engine("a")
    status, answer = await ask(engine, body)
    assert (status, engine.used) == (400, [])
    assert "lora_names" in answer["error"]["message"]


async def test_a_body_without_end_is_not_read_to_its_end() -> None:
    engine = Engine("a")
    part = b" " * 1024
    status, _ = await ask(engine, *[part] * (2 * MOST_BYTES // len(part)), body_of("a"))
    assert (status, engine.used) == (400, [])


async def test_of_who_hangs_up_nothing_is_done() -> None:
    engine = Engine("a")
    status, _ = await ask(engine, body_of("a"), hangs_up=True)
    assert (status, engine.used) == (400, [])


async def test_an_engine_that_fails_says_so() -> None:
    status, answer = await ask(Engine("a", fails=True), body_of("a"))
    assert status == 503
    assert "the engine is dead" in answer["error"]["message"]


@pytest.mark.parametrize(
    "other", [{"path": "/v1/completions"}, {"method": "GET"}, {"kind": "lifespan"}]
)
async def test_all_else_goes_on_to_the_application(other: dict[str, str]) -> None:
    engine = Engine("a")
    assert await ask(engine, body_of("a"), **other) == (0, {})  # type: ignore[arg-type]
    assert engine.used == []
