"""Documents to tokens, and which of the tokens are to be predicted.

Knows nothing of batches, models or training; a tokenizer is all it needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError

from expert_trainer.errors import BaseModelError, CorpusError
from expert_trainer.types import Document, Example, Message

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")
_ASSISTANT = "assistant"


class RenderError(CorpusError):
    """A document that gives the model nothing to learn; the text says why."""


class Renderer:
    """Turns documents into examples with one tokenizer.

    A plain text is predicted whole, with the tokenizer's own special tokens in front and the
    end-of-sequence token behind. Of a prompt with its completion, the completion and the end are
    predicted; both are tokenized apart, as a request's prompt will be. Of a chat, the assistant's
    turns are predicted, see `_render_chat`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        self._has_template = template is not None
        self._marks_turns = isinstance(template, str) and bool(_GENERATION_BLOCK.search(template))

    def render(self, document: Document) -> Example:
        """The document's tokens.

        Raises:
            RenderError: nothing is left to predict, or the chat template refuses the turns.
            BaseModelError: a chat, and the base's tokenizer has no chat template.
        """
        if document.messages is not None:
            example = self._render_chat(list(document.messages))
        elif document.prompt is not None:
            example = self._render_pair(document.prompt, document.text)
        else:
            ids = self._closed(self._encode(document.text))
            example = _masked(ids, [True] * len(ids))
        if not any(example.targets):
            raise RenderError("no token to predict")
        return example

    def _render_pair(self, prompt: str, completion: str) -> Example:
        given = self._encode(prompt)
        wanted = self._closed(self._encode(completion, special=False))
        return _masked(given + wanted, [False] * len(given) + [True] * len(wanted))

    def _render_chat(self, messages: list[Message]) -> Example:
        """Render through the chat template; predict the assistant's turns.

        Where the template marks them with `{% generation %}` blocks, those marks decide. Where it
        does not, a turn is what the rendered chat gains over the chat before the turn with the
        generation prompt added: its content and the template's end of turn. A template that
        rewrites earlier turns has no such gain for them; they are then not predicted.
        """
        if not self._has_template:
            raise BaseModelError(
                "the base's tokenizer has no chat template, so chats ('messages') cannot be "
                "trained on; take an instruct model as base.model, or rows of plain text"
            )
        try:
            if self._marks_turns:
                return self._render_marked(messages)
            text = self._apply(messages)
            spans = list(self._assistant_spans(messages, text))
        except (TemplateError, TypeError, KeyError) as error:
            raise RenderError(f"the chat template refuses it: {error}") from None
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        targets = [
            any(start <= begin < stop for start, stop in spans)
            for begin, _ in encoded["offset_mapping"]
        ]
        return _masked(list(encoded["input_ids"]), targets)

    def _render_marked(self, messages: list[Message]) -> Example:
        encoded = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        targets = [bool(mark) for mark in encoded["assistant_masks"]]
        return _masked(list(encoded["input_ids"]), targets)

    def _assistant_spans(self, messages: list[Message], text: str) -> Iterator[tuple[int, int]]:
        """Character spans of the assistant's turns in the rendered chat."""
        for index, message in enumerate(messages):
            if message["role"] != _ASSISTANT:
                continue
            before = self._apply(messages[:index], add_generation_prompt=True)
            after = self._apply(messages[: index + 1])
            if after.startswith(before) and text.startswith(after):
                yield len(before), len(after)

    def _apply(self, messages: list[Message], **options: bool) -> str:
        rendered: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return rendered

    def _encode(self, text: str, special: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _closed(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _masked(ids: list[int], targets: list[bool]) -> Example:
    return Example(token_ids=ids, targets=[False, *targets[1:]])
