"""vLLM's error answers, as its version 0.32 writes them, in our shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.gateway.engine_errors import read_engine_error, read_setback
from server.gateway.protocol import Call


def answer(status: int, param: str | None, body: bytes = b'{"model":"m"}', **more: Any) -> Any:
    fields = {"message": "why", "type": "BadRequestError", "param": param, "code": status, **more}
    return read_engine_error(status, json.dumps({"error": fields}).encode(), Call(body), 128)


@pytest.mark.parametrize("param", ["input_tokens", "input_text"])
def test_a_prompt_over_the_context_length(param: str) -> None:
    error = answer(400, param)
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert error.message == "why"


@pytest.mark.parametrize("param", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_a_token_budget_over_the_context_length(param: str) -> None:
    over = json.dumps({"model": "m", param: 129}).encode()
    within = json.dumps({"model": "m", param: 0}).encode()
    assert answer(400, param, over).code == "context_length_exceeded"
    assert answer(400, param, within).code == "invalid_request"
    assert answer(400, param).code == "invalid_request"


@pytest.mark.parametrize(
    ("status", "code", "type_"),
    [
        (400, "invalid_request", "invalid_request_error"),
        (404, "model_not_found", "invalid_request_error"),
        (422, "invalid_request", "invalid_request_error"),
        (500, "engine_error", "server_error"),
        (501, "not_supported", "server_error"),
        (503, "engine_error", "server_error"),
    ],
)
def test_statuses(status: int, code: str, type_: str) -> None:
    error = answer(status, "temperature")
    assert (error.status, error.code, error.type) == (status, code, type_)


def test_an_engines_failure_says_what_to_do() -> None:
    assert "(why). Send it again" in answer(500, None).message


def test_the_parameter_loses_its_place_in_the_http_message() -> None:
    assert answer(400, "body.messages").param == "messages"
    assert answer(400, None).param is None


def test_a_number_beyond_all_floats_is_the_engines_to_refuse() -> None:
    error = answer(400, "max_tokens", b'{"model":"m","max_tokens":1e999}')
    assert (error.status, error.code, error.message) == (400, "invalid_request", "why")


@pytest.mark.parametrize("number", [b"1e999", b"-1e999"])
def test_an_engines_answer_with_such_a_number(number: bytes) -> None:
    body = b'{"error":{"message":' + number + b',"code":' + number + b"}}"
    error = read_engine_error(400, body, Call(b'{"model":"m"}'), 128)
    assert (error.status, error.code) == (400, "invalid_request")


@pytest.mark.parametrize("body", [b"", b"Internal Server Error", b'{"detail":"x"}', b"[1]"])
def test_an_answer_that_is_no_error_object(body: bytes) -> None:
    error = read_engine_error(502, body, Call(b'{"model":"m"}'), None)
    assert error.code == "engine_error"
    assert "502" in error.message


def test_anthropics_shape_is_read_too() -> None:
    body = b'{"type":"error","error":{"type":"BadRequestError","message":"why"}}'
    error = read_engine_error(400, body, Call(b'{"model":"m"}'), 128)
    assert (error.message, error.code) == ("why", "invalid_request")


def refusal(**fields: Any) -> bytes:
    return json.dumps({"error": {"message": "why", **fields}}).encode()


@pytest.mark.parametrize("fields", [{"param": "model"}, {"param": None}, {}])
def test_an_engine_that_does_not_hold_the_model(fields: dict[str, Any]) -> None:
    assert read_setback(404, refusal(type="NotFoundError", **fields)) == "unknown-model"


@pytest.mark.parametrize(
    "message",
    [
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "cannot schedule new futures after shutdown",
    ],
)
def test_an_engine_that_is_dead_or_ends(message: str) -> None:
    body = refusal(message=message, type="InternalServerError")
    assert read_setback(500, body) == "dead-engine"
    assert read_setback(400, body) is None


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, refusal(type="invalid_request_error", param="response_id")),
        (404, refusal(type="NotFoundError", param="tool")),
        (404, b'{"detail": "Not Found"}'),
        (404, b"no JSON"),
        (400, refusal(type="NotFoundError", param="model")),
        (500, refusal(type="InternalServerError")),
    ],
)
def test_what_says_nothing_of_the_engine(status: int, body: bytes) -> None:
    assert read_setback(status, body) is None
