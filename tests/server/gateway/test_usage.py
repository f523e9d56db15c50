"""Tokens as answers of the several endpoints name them."""

from __future__ import annotations

import pytest

from server.gateway.usage import read_usage


@pytest.mark.parametrize(
    ("tail", "tokens"),
    [
        (b'{"usage":{"prompt_tokens":3,"total_tokens":7,"completion_tokens":4}}', (3, 4)),
        (b'"x"}],"usage": {"input_tokens": 5, "output_tokens": 6}}', (5, 6)),
        (b'data: {"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\ndata: [DONE]\n\n', (3, 4)),
        (b'{"type":"message_delta","usage":{"output_tokens":9}}', (None, 9)),
        (b'{"text":"\\"usage\\": {\\"prompt_tokens\\": 1}"}', (None, None)),
        (b'{"usage":null}', (None, None)),
        (b"", (None, None)),
    ],
)
def test_usage(tail: bytes, tokens: tuple[int | None, int | None]) -> None:
    assert read_usage(tail) == tokens
