"""Which text of a request is routed on, for every request shape of the endpoint.

Pure functions in two steps: a body's field becomes `Message`s (`chat_messages`,
`completion_messages`, `response_messages`, `anthropic_messages`, or `request_messages` for any of
them), and `routing_text` picks from those. Only what routing needs is checked; whether the rest of
a request is valid is the engine's to say. Knows nothing of HTTP, embeddings or experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from configs.schema import RouteOn
from router.errors import UnroutableError

Endpoint = Literal["chat", "completions", "responses", "messages"]

TEXT_FIELDS: dict[Endpoint, str] = {
    "chat": "messages",
    "completions": "prompt",
    "responses": "input",
    "messages": "messages",
}
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
INSTRUCTION_ROLES = frozenset({"system", "developer"})
DIALOGUE_ROLES = frozenset({"user", "assistant"})
ROUTED_CHARACTERS = 32_768
"""Of each message only the beginning is to be routed on. Embedders read less than that, yet would
first cut all of it into tokens: five seconds for 8 MB, in a thread that everybody waits for."""
NAME_A_MODEL = "put an expert's id or the base model's name into 'model' instead"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, reduced to what can be routed on."""

    role: str
    """`user`, `assistant`, `system`, `developer`, `tool` or whatever the client wrote."""
    text: str
    """Its text parts, joined by newlines; empty where it has none (an image, a tool call)."""


def routing_text(messages: Sequence[Message], route_on: RouteOn) -> str:
    """The text of a conversation that is embedded.

    `last_user` and `first_user` take the last and first user message that has text;
    `conversation` takes all user and assistant messages, the newest first, since embedders cut a
    long text at its end. Where the choice finds nothing, the instructions (system and developer
    messages) stand in, then any other text.

    Raises:
        UnroutableError: no message has any text.
    """
    for candidates in (_chosen(messages, route_on), _instructions(messages), messages):
        text = "\n".join(message.text for message in candidates if message.text)
        if text:
            return text
    raise UnroutableError("messages", f"holds no text to route on; {NAME_A_MODEL}")


def opening_text(messages: Sequence[Message]) -> str:
    """The text that decides where a sticky conversation lives: its first user message with text.

    Later turns only append, so it is the same in every request of a conversation, which lets a
    router without memory keep the conversation with its expert.

    Raises:
        UnroutableError: no message has any text.
    """
    return routing_text(messages, "first_user")


def request_messages(endpoint: Endpoint, body: Mapping[str, Any]) -> list[Message]:
    """The messages of a request body.

    Args:
        endpoint: `chat` (/v1/chat/completions), `completions` (/v1/completions), `responses`
            (/v1/responses) or `messages` (/v1/messages).
        body: the parsed JSON object.

    Raises:
        UnroutableError: the field that carries the text is missing, malformed or without text.
    """
    field = TEXT_FIELDS[endpoint]
    if field not in body:
        raise UnroutableError(field, "is missing")
    if endpoint == "chat":
        messages = chat_messages(body[field])
    elif endpoint == "completions":
        messages = completion_messages(body[field])
    elif endpoint == "responses":
        messages = response_messages(body[field], body.get("instructions"))
    else:
        messages = anthropic_messages(body[field], body.get("system"))
    if not any(message.text for message in messages):
        raise UnroutableError(field, f"holds no text to route on; {NAME_A_MODEL}")
    return messages


def chat_messages(messages: object, field: str = "messages") -> list[Message]:
    """Messages of a chat completion: `content` is text, a list of typed parts, or null.

    Raises:
        UnroutableError: not a list of objects with a `role`, or a content of another type.
    """
    if not isinstance(messages, list):
        raise UnroutableError(field, "must be a list of messages")
    if not messages:
        raise UnroutableError(field, "must hold at least one message")
    return [_message(item, f"{field}[{index}]") for index, item in enumerate(messages)]


def completion_messages(prompt: object) -> list[Message]:
    """A completion's prompt as one user message.

    One request goes to one expert, so several prompts are routed on together.

    Raises:
        UnroutableError: the prompt is token ids, or neither text nor a list of texts.
    """
    if isinstance(prompt, str):
        return [Message("user", prompt.strip())]
    if not isinstance(prompt, list) or not prompt:
        raise UnroutableError("prompt", "must be text or a list of texts")
    if all(isinstance(item, str) for item in prompt):
        return [Message("user", "\n".join(prompt).strip())]
    if all(isinstance(item, int | list) for item in prompt):
        raise UnroutableError(
            "prompt",
            f"is token ids, which have no meaning to route on; send text, or {NAME_A_MODEL}",
        )
    raise UnroutableError("prompt", "must be text or a list of texts")


def response_messages(items: object, instructions: object = None) -> list[Message]:
    """Messages of a `/v1/responses` request; items that are no messages (tool calls) are left out.

    Raises:
        UnroutableError: the input is neither text nor a list of objects, or an item is malformed.
    """
    messages = _instruction_messages(instructions, "instructions")
    if isinstance(items, str):
        return [*messages, Message("user", items.strip())]
    if not isinstance(items, list):
        raise UnroutableError("input", "must be text or a list of items")
    for index, item in enumerate(items):
        field = f"input[{index}]"
        if not isinstance(item, dict):
            raise UnroutableError(field, "must be an object")
        if item.get("type", "message") == "message":
            messages.append(_message(item, field))
    return messages


def anthropic_messages(messages: object, system: object = None) -> list[Message]:
    """Messages of a `/v1/messages` request, the top-level `system` prompt first.

    A user message that only hands back tool results has no text, so it is not routed on.

    Raises:
        UnroutableError: as `chat_messages`, or a `system` that is neither text nor text blocks.
    """
    return [*_instruction_messages(system, "system"), *chat_messages(messages)]


def _chosen(messages: Sequence[Message], route_on: RouteOn) -> list[Message]:
    if route_on == "conversation":
        return [message for message in reversed(messages) if message.role in DIALOGUE_ROLES]
    turns = [message for message in messages if message.role == "user" and message.text]
    return turns[:1] if route_on == "first_user" else turns[-1:]


def _instructions(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message.role in INSTRUCTION_ROLES]


def _instruction_messages(instructions: object, field: str) -> list[Message]:
    return [] if instructions is None else [Message("system", _content_text(instructions, field))]


def _message(item: object, field: str) -> Message:
    if not isinstance(item, dict):
        raise UnroutableError(field, "must be an object with 'role' and 'content'")
    role = item.get("role")
    if not isinstance(role, str):
        raise UnroutableError(f"{field}.role", "must be text, such as 'user'")
    return Message(role, _content_text(item.get("content"), f"{field}.content"))


def _content_text(content: object, field: str) -> str:
    """Text of a message's content; blank text counts as none."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, list):
        raise UnroutableError(field, "must be text or a list of parts")
    parts = (_part_text(part, f"{field}[{index}]") for index, part in enumerate(content))
    return "\n".join(text for text in parts if text)


def _part_text(part: object, field: str) -> str:
    if isinstance(part, str):
        return part.strip()
    if not isinstance(part, dict):
        raise UnroutableError(field, "must be an object with a 'type'")
    kind = part.get("type", "text" if "text" in part else "")
    if not isinstance(kind, str):
        raise UnroutableError(f"{field}.type", "must be text, such as 'text'")
    if kind not in TEXT_PARTS:
        return ""
    text = part.get("text")
    if not isinstance(text, str):
        raise UnroutableError(f"{field}.text", "must be text")
    return text.strip()
