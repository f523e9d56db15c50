from __future__ import annotations

import json
from typing import Any

import pytest

from server.batch.errors import LineError
from server.batch.requests import parse_request
from server.batch.types import Task

CHAT = [{"role": "user", "content": "hello there"}]


def parse(fields: dict[str, Any], **more: Any) -> Task:
    return parse_request(fields, place="line-7", **{"defaults": {}, **more})


def code_of(fields: dict[str, Any], **more: Any) -> str:
    with pytest.raises(LineError) as caught:
        parse(fields, **more)
    return caught.value.code


def openai(**fields: Any) -> dict[str, Any]:
    body = {"model": "introvert", "messages": CHAT}
    return {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
        **fields,
    }


def test_openais_format_keeps_every_option_but_the_model() -> None:
    task = parse(openai(body={"model": "expert-0001", "messages": CHAT, "top_p": 0.5, "n": 2}))
    assert (task.custom_id, task.path, task.model) == ("a", "/v1/chat/completions", "expert-0001")
    assert json.loads(task.body) == {"messages": CHAT, "top_p": 0.5, "n": 2}
    assert task.messages == ()


def test_a_routed_line_says_what_it_is_routed_on() -> None:
    assert [m.text for m in parse(openai()).messages] == ["hello there"]


def test_a_body_may_come_as_text_as_parquet_has_it() -> None:
    assert parse(openai(body=json.dumps({"model": "m", "messages": CHAT}))).model == "m"


def test_plain_lines_are_prompts_or_chats_with_options_beside_them() -> None:
    task = parse({"prompt": "Once", "max_tokens": 3})
    assert (task.custom_id, task.path, task.model) == ("line-7", "/v1/completions", "introvert")
    assert json.loads(task.body) == {"prompt": "Once", "max_tokens": 3}
    assert parse({"id": 5, "messages": CHAT}).custom_id == "5"


def test_defaults_are_for_lines_that_do_not_say() -> None:
    defaults = {"max_tokens": 9, "temperature": 0}
    task = parse({"prompt": "Once", "max_tokens": 3}, defaults=defaults)
    assert json.loads(task.body) == {"prompt": "Once", "max_tokens": 3, "temperature": 0}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        (openai(custom_id=None), "missing_custom_id"),
        (openai(method="GET"), "invalid_method"),
        (openai(url="/v1/embeddings"), "invalid_url"),
        (openai(url=None), "invalid_url"),
        (openai(body="[1]"), "invalid_request"),
        (openai(body={"messages": CHAT, "stream": True}), "invalid_request"),
        (openai(body={"messages": CHAT, "model": 3}), "invalid_request"),
        (openai(body={"messages": []}), "unroutable"),
        (openai(body={"messages": [{"role": "user", "content": ""}]}), "unroutable"),
        ({"text": "hello"}, "unknown_format"),
        ({"prompt": [1, 2, 3]}, "unroutable"),
    ],
)
def test_what_cannot_be_asked_is_an_error_line(fields: dict[str, Any], code: str) -> None:
    assert code_of(fields) == code


def test_a_batch_for_one_endpoint_refuses_others() -> None:
    assert code_of(openai(), endpoint="/v1/completions") == "mismatched_endpoint"


def test_route_lines_take_one_text_or_one_chat() -> None:
    task = parse(openai(url="/v1/route", body={"input": "hello"}))
    assert [m.text for m in task.messages] == ["hello"]
    assert code_of(openai(url="/v1/route", body={"input": ["a", "b"]})) == "invalid_request"
