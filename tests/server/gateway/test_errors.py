"""Errors in the three dialects."""

from __future__ import annotations

import json

import pytest

from server.gateway import errors
from server.gateway.errors import (
    EngineAnswerError,
    EngineLostError,
    GatewayError,
    ModelNotFoundError,
    body_of,
    event_of,
)

LOST = EngineLostError("gone", retry_after_s=3)


def test_openais_body() -> None:
    assert json.loads(body_of(ModelNotFoundError("no such", param="model"))) == {
        "error": {
            "message": "no such",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


def test_anthropics_body() -> None:
    assert json.loads(body_of(LOST, "anthropic")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "gone", "code": "engine_lost"},
    }


def test_a_responses_body_is_openais() -> None:
    assert body_of(LOST, "responses") == body_of(LOST, "openai")


def test_events() -> None:
    assert event_of(LOST).startswith(b'data: {"error":')
    name, data = event_of(LOST, "responses").decode().strip().split("\n")
    assert name == "event: error"
    event = json.loads(data.removeprefix("data: "))
    assert (event["type"], event["code"], event["error"]["code"]) == (
        "error",
        "engine_lost",
        "engine_lost",
    )
    assert event_of(LOST, "anthropic").startswith(b'event: error\ndata: {"type":"error"')
    for dialect in ("openai", "responses", "anthropic"):
        assert event_of(LOST, dialect).endswith(b"\n\n")  # type: ignore[arg-type]


def test_an_unavailable_service_says_when_to_come_back() -> None:
    assert LOST.headers == [(b"retry-after", b"3")]


def test_codes_are_the_classes_own() -> None:
    def below(cls: type[GatewayError]) -> list[type[GatewayError]]:
        return [cls, *(deeper for child in cls.__subclasses__() for deeper in below(child))]

    classes = [cls for cls in below(GatewayError) if not cls.__subclasses__()]
    own = [cls for cls in classes if cls not in (EngineAnswerError, errors.InternalError)]
    assert len({cls.code for cls in own}) == len(own)


@pytest.mark.parametrize("line", [name for name in dir(errors) if name.endswith("Error")])
def test_the_tree_names_every_class(line: str) -> None:
    assert errors.__doc__ is not None
    assert line in errors.__doc__
