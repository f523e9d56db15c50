"""An engine's error answers in the client's dialect, with a stable code.

vLLM answers `{"error": {"message", "type", "param", "code"}}` with the HTTP status as `code`, and
for `/v1/messages` an Anthropic error without `param`. What went wrong is told from the status and
the parameter it names; from its wording only that the engine behind the server is dead or ends,
which vLLM says in no other way.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Literal

import msgspec

from server.gateway.errors import BadRequestError, EngineAnswerError
from server.gateway.protocol import Call

TOO_LONG_PARAMS = frozenset({"input_tokens", "input_text"})
"""Parameters that vLLM names when the prompt alone is over the context length."""

LENGTH_PARAMS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""Fields that ask for a number of tokens; one over the context length cannot be met."""

CODES = {
    400: "invalid_request",
    404: "model_not_found",
    413: "request_too_large",
    422: "invalid_request",
    429: "rate_limit_exceeded",
    501: "not_supported",
}

UNKNOWN_MODEL = "NotFoundError"
"""Type of vLLM's answer about a model that it does not hold; an unknown response has another."""

DEAD_ENGINE = ("EngineCore encountered an issue", "cannot schedule new futures after shutdown")
"""How vLLM's server answers for as long as it outlives its engine, and while it ends itself."""

Setback = Literal["unknown-model", "dead-engine"]


class SetbackError(Exception):
    """The engine did not begin the request, or died before its answer: another may have it."""


class _EngineError(msgspec.Struct):
    message: str = ""
    type: str | None = None
    param: str | None = None


class _EngineAnswer(msgspec.Struct):
    error: _EngineError


_ANSWER = msgspec.json.Decoder(_EngineAnswer)


def read_engine_error(
    status: int, body: bytes, call: Call, max_model_len: int | None
) -> EngineAnswerError:
    """An engine's error answer as an error of ours.

    Args:
        status: HTTP status of the answer, 400 or more.
        body: its body.
        call: the request that it answers.
        max_model_len: context length of the engines, tokens, where it is known.
    """
    try:
        error = _ANSWER.decode(body).error
    except (msgspec.DecodeError, RecursionError):
        error = _EngineError()
    message = error.message or f"The engine answered with status {status} ({_phrase(status)})."
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        message = (
            f"The engine failed on this request ({message.rstrip('.')}). Send it again; GET /ready "
            "tells whether the engine is being restarted."
        )
    # vLLM names a field by its place in the HTTP message; clients know it by its name.
    param = error.param.removeprefix("body.") if error.param else None
    if status == HTTPStatus.BAD_REQUEST and _is_too_long(param, call, max_model_len):
        code = "context_length_exceeded"
    else:
        code = CODES.get(status, "engine_error" if status >= 500 else "invalid_request")
    type_ = "server_error" if status >= 500 else "invalid_request_error"
    return EngineAnswerError(message, status=status, code=code, type_=type_, param=param)


def read_setback(status: int, body: bytes) -> Setback | None:
    """What an engine's error answer says of the engine and not of the request, if it does.

    Args:
        status: HTTP status of the answer.
        body: its body.
    """
    if status not in (HTTPStatus.NOT_FOUND, HTTPStatus.INTERNAL_SERVER_ERROR):
        return None
    try:
        error = _ANSWER.decode(body).error
    except (msgspec.DecodeError, RecursionError):
        return None
    if status == HTTPStatus.NOT_FOUND:
        told = error.type == UNKNOWN_MODEL and error.param in ("model", None)
        return "unknown-model" if told else None
    return "dead-engine" if error.message.startswith(DEAD_ENGINE) else None


def _is_too_long(param: str | None, call: Call, max_model_len: int | None) -> bool:
    """Whether a 400 says that prompt and answer do not fit into the context.

    vLLM refuses a token budget over the context length under the budget's name, which it uses for
    other faults of the budget too, so the value decides.
    """
    if param in TOO_LONG_PARAMS:
        return True
    if param in LENGTH_PARAMS and max_model_len is not None:
        try:
            asked = call.values((param,)).get(param)
        except BadRequestError:  # a number beyond all floats is what the engine refused
            return False
        return isinstance(asked, int) and asked > max_model_len
    return False


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "unknown"
