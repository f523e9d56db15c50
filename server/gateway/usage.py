"""How many tokens an answer says that it has: read from its end, not by parsing it."""

from __future__ import annotations

import re

TAIL_BYTES = 2048
"""Of an answer, where its `usage` is looked for: engines write it last, and a client's text cannot
look like it, since quotes in a text are escaped."""

_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d+)')
_OUTPUT = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d+)')


def read_usage(tail: bytes) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of the output, where the end of an answer names them.

    Args:
        tail: the last bytes of a JSON body or of an event stream.
    """
    at = tail.rfind(b'"usage"')
    if at < 0:
        return None, None
    prompt, output = _PROMPT.search(tail, at), _OUTPUT.search(tail, at)
    return (int(prompt[1]) if prompt else None), (int(output[1]) if output else None)
