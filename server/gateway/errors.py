"""The gateway's errors and what each of them is over HTTP.

ServerError
└── GatewayStartError             the process cannot begin to listen
GatewayError                      an answer that the gateway makes instead of an engine
├── BadRequestError         400
│   ├── InvalidJsonError
│   ├── MissingParameterError
│   ├── InvalidParameterError
│   └── UnroutableTextError
├── UnauthorizedError       401
├── ForbiddenModelError     403
├── UnknownPathError        404
├── ModelNotFoundError      404
├── FileNotKnownError       404
├── BatchNotKnownError      404
├── MethodNotAllowedError   405
├── RequestTimeoutError     408
├── FileInUseError          409
├── BatchOverError          409
├── BodyTooLargeError       413
│   ├── PromptTooLargeError
│   └── FileTooLargeError
├── HeadersTooLargeError    431
├── TryLaterError                 with Retry-After
│   ├── TooManyRequestsError    429
│   │   ├── RateLimitedError
│   │   ├── QueueFullError
│   │   └── YieldingError
│   └── UnavailableError        503
│       ├── NoEngineError
│       ├── RouterNotReadyError
│       ├── EngineLostError
│       ├── ControlPlaneError
│       └── QueueTimeoutError
├── EngineAnswerError       any   the engine's own refusal, in the client's dialect
├── EngineTimeoutError      504
├── DeadlineError           504
├── NoRoomError             507
└── InternalError           500

A class fixes status and code (but for the engine's own); a `code` never changes its meaning,
the message may. This module knows the dialects that clients speak, and nothing of requests,
engines or routing.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from server.errors import ServerError

Dialect = Literal["openai", "responses", "anthropic"]
"""How a client wants errors: OpenAI's object, the same in a Responses stream, or Anthropic's."""

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


class GatewayStartError(ServerError):
    """The gateway cannot start: its address or a file that it was given cannot be used."""


class GatewayError(Exception):
    """An error answer; its message says what to do next."""

    status: int = 500
    code: str = "internal_error"
    type: str = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.message = message
        self.param = param
        super().__init__(message)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that the answer carries beside its content type."""
        return []


class BadRequestError(GatewayError):
    """The request cannot be understood."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidJsonError(BadRequestError):
    """The body is not JSON."""

    code = "invalid_json"


class MissingParameterError(BadRequestError):
    """A field that the gateway needs is not there."""

    code = "missing_required_parameter"


class InvalidParameterError(BadRequestError):
    """A field that the gateway reads has the wrong type."""

    code = "invalid_type"


class UnroutableTextError(BadRequestError):
    """Nothing in the request can be routed on."""

    code = "unroutable"


class UnauthorizedError(GatewayError):
    """No API key, or one that is not known."""

    status = 401
    code = "invalid_api_key"
    type = "invalid_request_error"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """`WWW-Authenticate`, which a 401 must carry (RFC 9110, section 15.5.2)."""
        return [(b"www-authenticate", b"Bearer")]


class ForbiddenModelError(GatewayError):
    """The API key may not ask this model."""

    status = 403
    code = "model_not_allowed"
    type = "invalid_request_error"


class UnknownPathError(GatewayError):
    """There is no such endpoint."""

    status = 404
    code = "unknown_url"
    type = "invalid_request_error"


class ModelNotFoundError(GatewayError):
    """No model has this name."""

    status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class FileNotKnownError(GatewayError):
    """The API key has no file of this id."""

    status = 404
    code = "file_not_found"
    type = "invalid_request_error"


class BatchNotKnownError(GatewayError):
    """The API key has no batch of this id."""

    status = 404
    code = "batch_not_found"
    type = "invalid_request_error"


class FileInUseError(GatewayError):
    """A batch that is not over reads the file."""

    status = 409
    code = "file_in_use"
    type = "invalid_request_error"


class BatchOverError(GatewayError):
    """The batch is over, or all but over, so that it cannot be cancelled."""

    status = 409
    code = "batch_over"
    type = "invalid_request_error"


class MethodNotAllowedError(GatewayError):
    """The endpoint exists, the method on it does not."""

    status = 405
    code = "method_not_allowed"
    type = "invalid_request_error"

    def __init__(self, message: str, *, allow: str) -> None:
        self.allow = allow
        super().__init__(message)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """`Allow`, which a 405 must carry (RFC 9110, section 15.5.6)."""
        return [(b"allow", self.allow.encode())]


class BodyTooLargeError(GatewayError):
    """The body is over `gateway.max_body_bytes`."""

    status = 413
    code = "request_too_large"
    type = "invalid_request_error"


class PromptTooLargeError(BodyTooLargeError):
    """The prompt is over `gateway.max_prompt_bytes`."""

    code = "prompt_too_large"


class FileTooLargeError(BodyTooLargeError):
    """The file is over `gateway.max_file_bytes`."""

    code = "file_too_large"


class HeadersTooLargeError(GatewayError):
    """The headers are over `gateway.max_header_bytes`."""

    status = 431
    code = "headers_too_large"
    type = "invalid_request_error"


class RequestTimeoutError(GatewayError):
    """The client took too long to send its request."""

    status = 408
    code = "request_timeout"
    type = "invalid_request_error"


class TryLaterError(GatewayError):
    """What was asked can be answered later; the answer says when to ask again."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """`Retry-After`, in seconds."""
        return [(b"retry-after", str(self.retry_after_s).encode())]


class TooManyRequestsError(TryLaterError):
    """Refused for now, so that others, or the engines, are not overrun."""

    status = 429
    code = "too_many_requests"
    type = "rate_limit_error"


class RateLimitedError(TooManyRequestsError):
    """The API key has asked too often, or has too many requests running."""

    code = "rate_limit_exceeded"


class QueueFullError(TooManyRequestsError):
    """Too many requests wait for the worker already."""

    code = "queue_full"


class YieldingError(TooManyRequestsError):
    """A background request that would take a live one's place, now or soon."""

    code = "yielding"


class UnavailableError(TryLaterError):
    """Cannot be answered now, but soon."""

    status = 503
    code = "unavailable"
    type = "service_unavailable"


class NoEngineError(UnavailableError):
    """No ready engine holds the model."""

    code = "no_engine"


class RouterNotReadyError(UnavailableError):
    """No router for the bundle that is served, so nothing can be routed by meaning."""

    code = "router_not_ready"


class EngineLostError(UnavailableError):
    """The engine went away after it had been given the request."""

    code = "engine_lost"


class ControlPlaneError(UnavailableError):
    """The control plane does not answer, so nothing can be changed now."""

    code = "control_plane_down"


class QueueTimeoutError(UnavailableError):
    """It waited for a worker for as long as it may."""

    code = "queue_timeout"


class DeadlineError(GatewayError):
    """The request took longer than its deadline."""

    status = 504
    code = "deadline_exceeded"
    type = "timeout_error"


class EngineTimeoutError(GatewayError):
    """The engine was silent for longer than `gateway.request_timeout_s`."""

    status = 504
    code = "engine_timeout"


class NoRoomError(GatewayError):
    """The disk on which files and batches are kept is full."""

    status = 507
    code = "insufficient_storage"


class InternalError(GatewayError):
    """A defect of the gateway; the log has the traceback under the request's id."""


class EngineAnswerError(GatewayError):
    """An engine's own error answer: status, code and type come from there, not from the class."""

    def __init__(
        self, message: str, *, status: int, code: str, type_: str, param: str | None = None
    ) -> None:
        self.status = status
        self.code = code
        self.type = type_
        super().__init__(message, param=param)


def body_of(error: GatewayError, dialect: Dialect = "openai") -> bytes:
    """The error as a JSON body in the client's dialect."""
    return msgspec.json.encode(
        _document(error, "anthropic" if dialect == "anthropic" else "openai")
    )


def event_of(error: GatewayError, dialect: Dialect = "openai") -> bytes:
    """The error as the last server-sent event of a stream that cannot go on."""
    name = b"" if dialect == "openai" else b"event: error\n"
    return name + b"data: " + msgspec.json.encode(_document(error, dialect)) + b"\n\n"


def _document(error: GatewayError, dialect: Dialect) -> dict[str, Any]:
    if dialect == "anthropic":
        kind = ANTHROPIC_TYPES.get(error.status, "api_error")
        return {
            "type": "error",
            "error": {"type": kind, "message": error.message, "code": error.code},
        }
    fields = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    if dialect == "responses":
        # The Responses API's own error event is flat; its clients, too, look for `error` first.
        return {**fields, "type": "error", "error": fields}
    return {"error": fields}
