"""The door of an engine: an ASGI middleware that lets in nobody without the engine's key.

vLLM's own check covers the routes under `/v1` and a few others; requests to generate and to load
adapters from any path are also answered elsewhere (`/invocations`, `/adapters`). Loaded into the
engine's process by its `--middleware` argument; standard library only. Knows nothing of what it
guards but the routes that stay open.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

KEY_VARIABLE = "VLLM_API_KEY"
OPEN = frozenset({"/health", "/metrics", "/metrics/", "/version"})
"""Answered without the key, to GET alone: they tell how the engine is, and change nothing."""
REFUSAL = {
    "message": "this engine answers its own gateway alone; send requests to that",
    "type": "invalid_request_error",
    "param": None,
    "code": "engine_key_required",
}


class EngineDoor:
    """The middleware; without a key in the environment everybody may pass."""

    def __init__(self, app: App) -> None:
        """Guard `app`."""
        self._app = app
        key = os.environ.get(KEY_VARIABLE)
        self._pass = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or let the application answer it."""
        if self._lets_in(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            body = json.dumps({"error": REFUSAL}).encode()
            await send({"type": "http.response.body", "body": body})

    def _lets_in(self, scope: Message) -> bool:
        if self._pass is None or scope["type"] == "lifespan":
            return True
        if scope.get("method") == "GET" and scope["path"] in OPEN:
            return True
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        return any(hmac.compare_digest(value, self._pass) for value in shown)
