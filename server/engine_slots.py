"""An engine's slots filled ahead: an ASGI middleware that copies adapters in before they are asked.

vLLM copies an adapter from host memory into a slot in the step that first computes with it, and
none of its routes does so earlier. This one has the engine do it between two steps, while the
request that needs the adapter still waits for its turn. There is one slot more than experts are
asked at once, so that what is copied in drives out none that is in use. Loaded into the engine's
process by its `--middleware` argument; standard library only. Knows nothing of who waits for what.
"""

from __future__ import annotations

import json

from server.engine_door import App, Message, Receive, Send

AHEAD = 1
"""Slots of an engine beyond the experts that are asked at once: for one that is copied in ahead,
or for the probe of one that has just been loaded."""
FILL_PATH = "/v1/fill_lora_slots"
MOST_BYTES = 64 * 1024


class SlotFiller:
    """The middleware that answers `POST /v1/fill_lora_slots`; the rest goes to the application.

    The body is `{"lora_names": [...]}`, names of adapters. They are used in this order, the last
    one most lately; those that lie in no slot yet take the place of those that were used least
    lately. The last one is to be filled and has to be loaded; of the others, which are to be kept,
    those that are loaded no more are passed over.
    """

    def __init__(self, app: App) -> None:
        """Stand before `app`."""
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one call, or let the application answer it."""
        if scope["type"] != "http" or scope["path"] != FILL_PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        names = _names(await _read(receive))
        if names is None:
            await _answer(send, 400, "the body is not {'lora_names': [...]}")
            return
        state = scope["app"].state
        loaded = state.openai_serving_models.lora_requests
        if names[-1] not in loaded:
            await _answer(send, 404, f"not loaded: {names[-1]}"[:300])
            return
        try:
            for name in filter(loaded.__contains__, names):
                # of an adapter that is loaded, this fills a slot and counts as its latest use
                await state.engine_client.add_lora(loaded[name])
        except Exception as error:  # noqa: BLE001 - whatever the engine met; requests go on
            await _answer(send, 503, f"the engine could not: {error}"[:300])
            return
        await _answer(send, 200)


async def _read(receive: Receive) -> bytes | None:
    """A body of bounded size; none if it is larger, or its sender is gone."""
    body = bytearray()
    while len(body) <= MOST_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)
    return None


def _names(body: bytes | None) -> list[str] | None:
    try:
        names = json.loads(body or b"")["lora_names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        return None
    return names


async def _answer(send: Send, status: int, fault: str | None = None) -> None:
    body = json.dumps({"error": {"message": fault, "code": status}} if fault else {}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
