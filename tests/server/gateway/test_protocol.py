"""Bodies and headers, without a socket."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.errors import BadRequestError, InvalidJsonError, InvalidParameterError
from server.gateway.protocol import Call, parse_object, read_head

# Lone surrogates are no Unicode text: JSON parsers disagree about them, so they are refused.
text = st.text(st.characters(exclude_categories=("Cs",)))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
MODEL = msgspec.Raw(b'"expert-0000@aaaaaaaaaaaa"')


@given(
    fields=st.dictionaries(text.filter(lambda name: name != "model"), values, max_size=6),
    position=st.integers(0, 6),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
)
def test_every_value_but_the_model_keeps_its_bytes(
    fields: dict[str, Any], position: int, indent: int | None, ascii_only: bool
) -> None:
    items = list(fields.items())
    items.insert(position, ("model", "introvert"))
    written = {
        name: json.dumps(value, indent=indent, ensure_ascii=ascii_only) for name, value in items
    }
    joined = " , ".join(f"{json.dumps(name)} : {value}" for name, value in written.items())
    sent = Call(f"{{ {joined} }}".encode()).body_for(MODEL)
    raw = msgspec.json.decode(sent, type=dict[str, msgspec.Raw])
    assert list(raw) == list(written)
    assert {name: bytes(value).decode() for name, value in raw.items()} == {
        **written,
        "model": '"expert-0000@aaaaaaaaaaaa"',
    }


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        model = Call(body).model
    except BadRequestError:
        with contextlib.suppress(ValueError):
            assert not isinstance(json.loads(body), dict) or "model" not in json.loads(body)
    else:
        assert json.loads(body)["model"] == model


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","b":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"a"} x',
        b'{"model":',
    ],
)
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(InvalidJsonError):
        Call(body)


def test_escapes_in_the_model_are_read() -> None:
    assert Call(b'{"model":"\\u0061\\u0062"}').model == "ab"


def test_only_the_fields_asked_for_are_decoded() -> None:
    call = Call(b'{"model":"a","messages":[1, {"b":null}],"rest":2}')
    assert call.values(("messages", "absent")) == {"messages": [1, {"b": None}]}


@pytest.mark.parametrize("value", [b'[{"content":1e999}]', b"1" * 5000])
def test_a_number_beyond_all_floats_is_the_clients_fault(value: bytes) -> None:
    body = b'{"model":"a","messages":' + value + b"}"
    with pytest.raises(InvalidParameterError) as caught:
        Call(body).values(("messages",))
    assert caught.value.param == "messages"
    with pytest.raises(InvalidParameterError):
        parse_object(body)


def test_any_depth_is_read_or_refused() -> None:
    for depth in range(1, 1200):
        with contextlib.suppress(InvalidJsonError):
            Call(b'{"model":"a","b":' + b"[" * depth + b"]" * depth + b"}").values(("b",))


@given(st.binary(max_size=40))
def test_any_value_is_read_or_refused(value: bytes) -> None:
    with contextlib.suppress(BadRequestError):
        Call(b'{"model":"a","messages":' + value + b"}").values(("messages",))


def test_an_object_is_asked_for() -> None:
    with pytest.raises(InvalidParameterError):
        parse_object(b"3")


@pytest.mark.parametrize(
    ("value", "background"), [(b"batch", True), (b"Batch", False), (b"", False), (b"live", False)]
)
def test_only_one_priority_means_something(value: bytes, background: bool) -> None:
    head = read_head({"headers": [(b"x-introvert-priority", value), (b"x-introvert-tenant", b"a")]})
    assert head.background is background
    assert not {"x-introvert-priority", "x-introvert-tenant"} & set(head.forwarded)


@pytest.mark.parametrize("sent", [b"", b"x" * 129, b"a b", b"\xc3\xa4"])
def test_a_request_id_that_is_no_token_is_replaced(sent: bytes) -> None:
    head = read_head({"headers": [(b"x-request-id", sent)]})
    assert len(head.request_id) == 32
    assert head.forwarded["x-request-id"] == head.request_id
