from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import RouteOn
from router.conversation import (
    Endpoint,
    Message,
    anthropic_messages,
    chat_messages,
    completion_messages,
    opening_text,
    request_messages,
    response_messages,
    routing_text,
)
from router.errors import UnroutableError

CHAT = [
    Message("system", "be brief"),
    Message("user", "how do I bake bread"),
    Message("assistant", "with flour"),
    Message("tool", "oven is on"),
    Message("user", "and who won the cup"),
]


@pytest.mark.parametrize(
    ("route_on", "text"),
    [
        ("last_user", "and who won the cup"),
        ("first_user", "how do I bake bread"),
        ("conversation", "and who won the cup\nwith flour\nhow do I bake bread"),
    ],
)
def test_the_chosen_part_is_routed_on(route_on: RouteOn, text: str) -> None:
    assert routing_text(CHAT, route_on) == text


@pytest.mark.parametrize("route_on", ["last_user", "first_user", "conversation"])
def test_instructions_stand_in_where_nobody_asks(route_on: RouteOn) -> None:
    messages = [Message("system", "you sort mail"), Message("tool", "x"), Message("user", "")]
    assert routing_text(messages, route_on) == "you sort mail"


def test_any_text_is_better_than_none() -> None:
    assert routing_text([Message("tool", "oven is on")], "last_user") == "oven is on"


def test_a_turn_without_text_is_passed_over() -> None:
    messages = [Message("user", "what is this"), Message("user", "")]
    assert routing_text(messages, "last_user") == "what is this"


def test_no_text_at_all_cannot_be_routed() -> None:
    with pytest.raises(UnroutableError, match=r"no text to route on.*'model'"):
        routing_text([Message("user", "")], "last_user")


roles = st.sampled_from(["user", "assistant", "system", "tool"])
histories = st.lists(st.builds(Message, roles, st.text(max_size=5)), max_size=6)


@given(histories, histories)
def test_the_opening_stays_the_same_as_a_conversation_grows(
    history: list[Message], later: list[Message]
) -> None:
    started = [*history, Message("user", "hello")]
    assert opening_text(started) == opening_text([*started, *later])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("  plain ", "plain"),
        (None, ""),
        ([], ""),
        (["bare", {"type": "text", "text": "typed"}], "bare\ntyped"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "a\nb"),
        (
            [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "x"}],
            "x",
        ),
        ([{"text": "untyped"}, {"image_url": "data:"}], "untyped"),
        ([{"type": "refusal", "refusal": "no"}], ""),
    ],
)
def test_text_of_a_content(content: Any, text: str) -> None:
    assert chat_messages([{"role": "user", "content": content}]) == [Message("user", text)]


def test_a_message_may_lack_content() -> None:
    message = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    assert chat_messages([message]) == [Message("assistant", "")]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("hi", "messages"),
        (None, "messages"),
        ({}, "messages"),
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": 3, "content": "hi"}], "messages[0].role"),
        (
            [{"role": "user", "content": "hi"}, {"role": "user", "content": 5}],
            "messages[1].content",
        ),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
        ([{"role": "user", "content": [7]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": []}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": []}]}],
            "messages[0].content[0].text",
        ),
    ],
)
def test_a_malformed_chat_names_the_field(messages: Any, field: str) -> None:
    with pytest.raises(UnroutableError) as caught:
        chat_messages(messages)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"'{field}' ")


@pytest.mark.parametrize(
    ("prompt", "text"), [("once upon", "once upon"), (["one", "two"], "one\ntwo"), (" x\n", "x")]
)
def test_a_prompt_is_one_user_message(prompt: Any, text: str) -> None:
    assert completion_messages(prompt) == [Message("user", text)]


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2], [3]]])
def test_token_ids_cannot_be_routed(prompt: Any) -> None:
    with pytest.raises(UnroutableError, match=r"token ids.*send text.*'model'") as caught:
        completion_messages(prompt)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("prompt", [None, 5, {}, [], ["a", 1], [None]])
def test_a_malformed_prompt_names_the_field(prompt: Any) -> None:
    with pytest.raises(UnroutableError, match="'prompt' must be text or a list of texts"):
        completion_messages(prompt)


def test_response_input_as_text() -> None:
    assert response_messages(" hello ", "be kind") == [
        Message("system", "be kind"),
        Message("user", "hello"),
    ]


def test_response_input_as_items() -> None:
    items = [
        {"role": "user", "content": "first"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "42"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "last"}]},
    ]
    assert response_messages(items) == [
        Message("user", "first"),
        Message("assistant", "a"),
        Message("user", "last"),
    ]


@pytest.mark.parametrize(
    ("items", "instructions", "field"),
    [
        (None, None, "input"),
        (5, None, "input"),
        (["hi"], None, "input[0]"),
        ([{"content": "hi"}], None, "input[0].role"),
        ([{"role": "user", "content": 1}], None, "input[0].content"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], None, "input[0].content[0].text"),
        ("hi", 5, "instructions"),
    ],
)
def test_a_malformed_response_names_the_field(items: Any, instructions: Any, field: str) -> None:
    with pytest.raises(UnroutableError) as caught:
        response_messages(items, instructions)
    assert caught.value.field == field


def test_anthropic_messages_with_system_and_tool_results() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "weather"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "w", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "content": "rain"}]},
    ]
    parsed = anthropic_messages(messages, [{"type": "text", "text": "be brief"}])
    assert parsed[0] == Message("system", "be brief")
    assert routing_text(parsed, "last_user") == "weather"


@pytest.mark.parametrize(
    ("messages", "system", "field"),
    [
        ([{"role": "user", "content": "x"}], 3, "system"),
        ([{"role": "user", "content": "x"}], [{"type": "text"}], "system[0].text"),
        ("x", None, "messages"),
    ],
)
def test_malformed_anthropic_messages_name_the_field(
    messages: Any, system: Any, field: str
) -> None:
    with pytest.raises(UnroutableError) as caught:
        anthropic_messages(messages, system)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("chat", {"messages": [{"role": "user", "content": "hi"}]}),
        ("completions", {"prompt": "hi"}),
        ("responses", {"input": "hi"}),
        ("messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
    ],
)
def test_every_endpoint_has_its_field(endpoint: Endpoint, body: dict[str, Any]) -> None:
    assert request_messages(endpoint, body) == [Message("user", "hi")]


@pytest.mark.parametrize(
    ("endpoint", "field", "blank"),
    [
        ("chat", "messages", [{"role": "user", "content": " "}]),
        ("completions", "prompt", "\n"),
        ("responses", "input", []),
        ("messages", "messages", [{"role": "user", "content": [{"type": "image"}]}]),
    ],
)
def test_a_request_without_text_names_its_field(endpoint: Endpoint, field: str, blank: Any) -> None:
    with pytest.raises(UnroutableError, match="no text to route on") as without_text:
        request_messages(endpoint, {field: blank})
    with pytest.raises(UnroutableError, match="is missing") as without_field:
        request_messages(endpoint, {"model": "introvert"})
    assert without_text.value.field == without_field.value.field == field


def test_instructions_count_as_text() -> None:
    body = {"input": [], "instructions": "write a poem"}
    assert request_messages("responses", body) == [Message("system", "write a poem")]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.sampled_from(["chat", "completions", "responses", "messages"]),
    st.dictionaries(
        st.sampled_from(["messages", "prompt", "input", "system", "instructions"]), json_values
    ),
)
def test_no_body_breaks_the_reading(endpoint: Endpoint, body: dict[str, Any]) -> None:
    """Whatever the JSON, it is read into text or refused with the one error the gateway expects."""
    with contextlib.suppress(UnroutableError):
        assert routing_text(request_messages(endpoint, body), "last_user").strip()
