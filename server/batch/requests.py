"""One row of an input to a request: OpenAI's batch format, or a plain prompt or chat.

Pure. Knows nothing of files or of who answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from router.conversation import ROUTED_CHARACTERS, Endpoint, Message, request_messages
from router.errors import UnroutableError
from server.batch.errors import LineError
from server.batch.types import Task
from server.table import ROUTED_MODEL

ROUTE_PATH = "/v1/route"
KINDS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
}
PATHS = (*KINDS, ROUTE_PATH)

_OURS = frozenset({"custom_id", "id"})
_JSON = msgspec.json.Encoder()


def parse_request(
    fields: Mapping[str, Any],
    *,
    place: str,
    defaults: Mapping[str, Any],
    endpoint: str | None = None,
) -> Task:
    """A request from a row.

    A row with `url` or `body` is of OpenAI's batch format: `custom_id`, `method`, `url`, `body`.
    Any other one is plain: `messages` or `prompt`, and sampling options beside it.

    Args:
        fields: the row.
        place: the line's own name, should it have no `custom_id`.
        defaults: fields of a body, for rows that do not set them.
        endpoint: the only path that rows may name; none: any.

    Raises:
        LineError: it is no request that a batch can ask.
    """
    if "url" in fields or "body" in fields:
        custom_id, path, body = _openai(fields)
    else:
        custom_id, path, body = _plain(fields, place)
    if path not in PATHS:
        raise LineError("invalid_url", f"'url' is {path[:100]!r}; a batch asks {', '.join(PATHS)}")
    if endpoint is not None and path != endpoint:
        raise LineError("mismatched_endpoint", f"'url' is {path}, and the batch's is {endpoint}")
    if path == ROUTE_PATH:
        return Task(custom_id, path, ROUTED_MODEL, _encode(body), _explained(body))
    if body.get("stream"):
        raise LineError("invalid_request", "'stream' is not possible in a batch; leave it out")
    model = body.pop("model", ROUTED_MODEL)
    if not isinstance(model, str) or not model:
        raise LineError("invalid_request", "'model' must be a name")
    body = {**defaults, **body}
    body.pop("model", None)
    messages = _messages(KINDS[path], body) if model == ROUTED_MODEL else ()
    return Task(custom_id, path, model, _encode(body), messages)


def _openai(fields: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError(
            "missing_custom_id", "'custom_id' is missing; give each line one of its own"
        )
    if (method := fields.get("method", "POST")) != "POST":
        raise LineError(
            "invalid_method", f"'method' is {str(method)[:20]!r}; only POST is possible"
        )
    path, body = fields.get("url"), fields.get("body")
    if not isinstance(path, str):
        raise LineError("invalid_url", f"'url' is missing; a batch asks {', '.join(PATHS)}")
    if isinstance(body, str):  # as Parquet files carry it
        try:
            body = msgspec.json.decode(body)
        except msgspec.DecodeError:
            body = None
    if not isinstance(body, dict):
        raise LineError("invalid_request", "'body' must be a JSON object")
    return custom_id, path, dict(body)


def _plain(fields: Mapping[str, Any], place: str) -> tuple[str, str, dict[str, Any]]:
    custom_id = fields.get("custom_id", fields.get("id"))
    body = {name: value for name, value in fields.items() if name not in _OURS}
    if "messages" in body:
        path = "/v1/chat/completions"
    elif "prompt" in body:
        path = "/v1/completions"
    else:
        raise LineError(
            "unknown_format",
            "the line has neither 'url' and 'body' (OpenAI's batch format) nor 'messages' nor "
            "'prompt'",
        )
    return place if custom_id is None else str(custom_id), path, body


def _explained(body: Mapping[str, Any]) -> tuple[Message, ...]:
    """What a line for `/v1/route` asks of: one text or one chat."""
    if "messages" in body:
        return _messages("chat", body)
    text = body.get("input")
    if not isinstance(text, str):
        raise LineError("invalid_request", "give 'input', one text, or 'messages', one chat")
    return _messages("completions", {"prompt": text})


def _messages(kind: Endpoint, body: Mapping[str, Any]) -> tuple[Message, ...]:
    try:
        messages = request_messages(kind, body)
        if not any(message.text for message in messages):
            raise UnroutableError("messages", "holds no text to route on")
    except UnroutableError as error:
        raise LineError("unroutable", f"{error}") from None
    return tuple(Message(m.role, m.text[:ROUTED_CHARACTERS]) for m in messages)


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return _JSON.encode(body)
    except (TypeError, ValueError, UnicodeEncodeError) as error:
        raise LineError(
            "invalid_request", f"the line cannot be written as JSON ({error})"
        ) from None
