from __future__ import annotations

import json
from typing import Any

import pytest

from server.engine_door import KEY_VARIABLE, EngineDoor


async def visit(
    path: str, *, kind: str = "http", method: str = "POST", authorization: str | None = None
) -> list[dict[str, Any]]:
    """What the door, or the application behind it, sends."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "inside"})

    async def receive() -> dict[str, Any]:
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    sent: list[dict[str, Any]] = []
    headers = [(b"authorization", authorization.encode())] if authorization else []
    scope = {"type": kind, "method": method, "path": path, "headers": headers}
    await EngineDoor(app)(scope, receive, send)
    return sent


INSIDE = [{"type": "inside"}]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sesame")


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations", "/adapters", "/health"])
@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer sesam", "sesame"])
async def test_nobody_without_the_key_gets_in(path: str, authorization: str | None) -> None:
    start, body = await visit(path, authorization=authorization)
    assert start["status"] == 401
    assert json.loads(body["body"])["error"]["code"] == "engine_key_required"


async def test_whoever_shows_the_key_gets_in() -> None:
    assert await visit("/v1/completions", authorization="Bearer sesame") == INSIDE


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version"])
async def test_how_the_engine_is_may_be_seen_by_all(path: str) -> None:
    assert await visit(path, method="GET") == INSIDE


async def test_websockets_are_closed_and_the_engines_own_life_is_not_held_up() -> None:
    assert await visit("/v1/realtime", kind="websocket") == [
        {"type": "websocket.close", "code": 1008}
    ]
    assert await visit("/v1/realtime", kind="websocket", authorization="Bearer sesame") == INSIDE
    assert await visit("", kind="lifespan") == INSIDE


async def test_without_a_key_the_door_stands_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    assert await visit("/v1/completions") == INSIDE
