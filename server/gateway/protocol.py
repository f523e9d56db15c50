"""The endpoints that are forwarded, and the little of a request that the gateway reads.

A body is taken apart only to its top-level fields, each kept as the bytes it came in; putting it
together again changes the value of `model` and nothing else. This module knows no engine, no
expert and no answer.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from multidict import CIMultiDict
from starlette.types import Scope

from router.conversation import Endpoint as RequestKind
from server.gateway.errors import (
    Dialect,
    HeadersTooLargeError,
    InvalidJsonError,
    InvalidParameterError,
    MissingParameterError,
    PromptTooLargeError,
)
from server.gateway.tenants import ON_BEHALF


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint that an engine answers."""

    path: str
    kind: RequestKind
    """What the router calls requests of this shape."""
    dialect: Dialect
    routed_fields: tuple[str, ...]
    """Fields that routing by meaning may look at; the first is required."""
    summary: str


ENDPOINTS = (
    Endpoint("/v1/chat/completions", "chat", "openai", ("messages",), "Answer a chat"),
    Endpoint("/v1/completions", "completions", "openai", ("prompt",), "Continue a text"),
    Endpoint(
        "/v1/responses",
        "responses",
        "responses",
        ("input", "instructions"),
        "Answer in the Responses format",
    ),
    Endpoint(
        "/v1/messages",
        "messages",
        "anthropic",
        ("messages", "system"),
        "Answer in the Messages format",
    ),
)

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

DEADLINE = b"x-introvert-deadline-ms"
"""Header in which a client says how long it would wait."""

PRIORITY = b"x-introvert-priority"
"""Header by which a client lets others go first."""
BACKGROUND = b"batch"
"""Its one value that means something."""

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Headers that concern one connection alone (RFC 9110, section 7.6.1)."""

RESTATED = frozenset(
    {
        b"host",
        b"content-length",
        b"content-type",
        b"content-encoding",
        b"accept-encoding",
        b"expect",
        b"x-request-id",
        DEADLINE,
        PRIORITY,
    }
)
"""Headers that are written anew for the engine."""

CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"api-key", b"cookie", ON_BEHALF})
"""Headers that are for the gateway; engines ask for none."""

NOT_FORWARDED = HOP_BY_HOP | RESTATED | CREDENTIALS
NOT_RETURNED = HOP_BY_HOP | {b"content-length", b"server", b"date", b"x-request-id"}


@dataclass(frozen=True, slots=True)
class Head:
    """A request's headers, as far as forwarding needs them."""

    request_id: str
    """The client's `x-request-id` if it is a sane one, else a new one."""
    content_length: int | None
    forwarded: CIMultiDict[str]
    """Headers for the engine."""
    deadline_s: float | None = None
    """How long the client would wait, if it says so."""
    background: bool = False
    """Whether all others go first."""


def new_request_id() -> str:
    """32 random hexadecimal digits."""
    return os.urandom(16).hex()


def read_head(scope: Scope, limit: int | None = None) -> Head:
    """Sort a request's headers in one pass.

    Args:
        scope: of the request.
        limit: bytes that all headers may have together; none: any number.

    Raises:
        HeadersTooLargeError: they are larger.
        InvalidParameterError: the deadline is no positive number.
    """
    request_id = None
    content_length = None
    deadline_s = None
    background = False
    size = 0
    dropped = NOT_FORWARDED
    forwarded: CIMultiDict[str] = CIMultiDict()
    for name, value in scope["headers"]:
        size += len(name) + len(value)
        if name == b"content-length":
            content_length = int(value)
        elif name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            request_id = value.decode("ascii")
        elif name == b"connection" and (named := _named_by_connection(value)):
            dropped = dropped | named
        elif name == DEADLINE:
            deadline_s = _seconds(value)
        elif name == PRIORITY:
            background = value == BACKGROUND
        if name not in dropped:
            forwarded.add(name.decode("latin-1"), value.decode("latin-1"))
    if limit is not None and size > limit:
        raise HeadersTooLargeError(
            f"The headers are larger than the limit of {limit} bytes. Send fewer, or have "
            "'gateway.max_header_bytes' raised."
        )
    if dropped is not NOT_FORWARDED:
        for name in dropped:
            forwarded.popall(name.decode("latin-1"), None)
    request_id = request_id or new_request_id()
    forwarded["x-request-id"] = request_id
    forwarded["content-type"] = "application/json"
    forwarded["accept-encoding"] = "identity"
    return Head(request_id, content_length, forwarded, deadline_s, background)


Value = TypeVar("Value")

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_STRING = msgspec.json.Decoder(str)
_ANY = msgspec.json.Decoder()
_NOTHING = memoryview(b"")


class Call:
    """A parsed body: its fields by name, each in the bytes it came in."""

    __slots__ = ("_fields", "model")

    def __init__(self, body: bytes) -> None:
        """Take a body apart.

        Raises:
            InvalidJsonError: it is not JSON.
            InvalidParameterError: it is not an object, or `model` is not a string.
            MissingParameterError: there is no `model`.
        """
        self._fields = _fields(body)
        model = self._fields.get("model")
        if model is None:
            raise MissingParameterError(
                "The field 'model' is missing: give 'introvert' to route by meaning, or a name "
                "from GET /v1/models.",
                param="model",
            )
        self.model: str = _value("model", model, _STRING)

    def body_for(self, model: msgspec.Raw) -> bytes:
        """The body with another model; every other value keeps its bytes and its place."""
        self._fields["model"] = model
        return msgspec.json.encode(self._fields)

    def field(self, name: str, limit: int) -> memoryview:
        """The bytes of a field, as they came; empty where it is not there.

        Raises:
            PromptTooLargeError: they are more than `limit`.
        """
        raw = self._fields.get(name)
        if raw is None:
            return _NOTHING
        view = memoryview(raw)
        if view.nbytes > limit:
            raise PromptTooLargeError(
                f"'{name}' is larger than the limit of {limit} bytes. Send a shorter one, or have "
                "'gateway.max_prompt_bytes' raised.",
                param=name,
            )
        return view

    def values(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the fields that are there, as Python values.

        Raises:
            InvalidJsonError: one of them is nested too deeply.
            InvalidParameterError: one holds a number that no float can hold.
        """
        fields = self._fields
        return {name: _value(name, fields[name], _ANY) for name in names if name in fields}


def parse_object(body: bytes) -> dict[str, Any]:
    """A body as Python values.

    Raises:
        InvalidJsonError: it is not JSON.
        InvalidParameterError: it is not an object, or holds a number that no float can hold.
    """
    return {name: _value(name, raw, _ANY) for name, raw in _fields(body).items()}


def _fields(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        if not body.isascii():
            body.decode()  # the decoder skips values without looking at their encoding
        return _FIELDS.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidJsonError(
            f"The body is not JSON: byte {error.start} is not UTF-8. Send UTF-8."
        ) from None
    except msgspec.ValidationError:
        raise InvalidParameterError("The body must be a JSON object.") from None
    except msgspec.DecodeError as error:
        raise InvalidJsonError(
            f"The body is not JSON ({error}). Send one valid JSON object."
        ) from None
    except RecursionError:
        raise InvalidJsonError("The body is nested too deeply. Send a flatter object.") from None


def _value(name: str, raw: msgspec.Raw, decoder: msgspec.json.Decoder[Value]) -> Value:
    """A field's value, known to be JSON: what can fail is its type, size or depth."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidParameterError(
            f"'{name[:200]}' cannot be read ({error}). Send a value of the right type.", param=name
        ) from None
    except RecursionError:
        raise InvalidJsonError(
            f"'{name[:200]}' is nested too deeply. Send a flatter one.", param=name
        ) from None


def _seconds(milliseconds: bytes) -> float:
    try:
        seconds = float(milliseconds) / 1000
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidParameterError(
            f"'{DEADLINE.decode()}' must be a positive number of milliseconds.",
            param=DEADLINE.decode(),
        )
    return seconds


def _named_by_connection(value: bytes) -> frozenset[bytes]:
    tokens = {token.strip().lower() for token in value.split(b",")}
    return frozenset(tokens - {b"", b"keep-alive", b"close"})
