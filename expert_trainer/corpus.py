"""Rows to documents: what a row means, when two are equal, which are held out.

Three shapes of row are read: a plain text, a chat (`messages`), a `prompt` with its `completion`.
Knows nothing of tokens, clusters or models. No other field of a row is read, whatever it says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.schema import DataConfig, RouteOn
from expert_trainer.errors import CorpusError
from expert_trainer.sources import files_of, most_rows, read_rows
from expert_trainer.types import Document
from router.conversation import Message, chat_messages, routing_text
from router.errors import UnroutableError

logger = logging.getLogger(__name__)

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
FAULTS_REPORTED = 20
_HASH_BYTES = 16
_CHECKED_EVERY = 100


@dataclass
class CorpusReport:
    """What reading met with."""

    rows: int = 0
    bad: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    faults: list[str] = field(default_factory=list)
    """The first bad rows, each as FILE:LINE: why."""

    def note(self, where: str, fault: str) -> None:
        """Count a bad row; the first ones are logged and kept."""
        self.bad += 1
        if len(self.faults) < FAULTS_REPORTED:
            self.faults.append(f"{where}: {fault}")
            logger.warning("%s: %s; the row is skipped", where, fault)

    def check(self, max_bad_share: float, ahead: float = 0) -> None:
        """Stop a run whose data is mostly something else.

        Args:
            max_bad_share: share of the rows that may be bad.
            ahead: bound on the rows not read yet, which may all be good.

        Raises:
            CorpusError: more than `max_bad_share` of all rows are bad.
        """
        if self.bad > max_bad_share * (self.rows + ahead):
            shown = "\n".join(f"  {fault}" for fault in self.faults)
            raise CorpusError(
                f"{self.bad:,} of {self.rows:,} rows cannot be used, more than "
                f"data.max_bad_share={max_bad_share:g} allows; mend them or raise it:\n{shown}"
            )


def read_documents(
    sources: Sequence[str], config: DataConfig, report: CorpusReport, later: Sequence[str] = ()
) -> Iterator[Document]:
    """Documents of sources, one after another, copies included; bad rows are noted and skipped.

    Args:
        sources: entries of `data.train`, `data.valid` or `data.test`.
        config: fields' names and the share of bad rows at which to stop.
        report: counts what is met with.
        later: sources that will be read with the same report.

    Raises:
        CorpusError: unreadable sources, or so many bad rows that no other row can make up for them.
    """
    fields = (config.id_field, config.text_field, MESSAGES, PROMPT, COMPLETION)
    files = [file for source in sources for file in files_of(source)]
    bounds = [most_rows(file) for source in later for file in files_of(source)]
    for number, file in enumerate(files):
        ahead = sum(map(most_rows, files[number:])) + sum(bounds)
        for row in read_rows(file, fields):
            report.rows += 1
            parsed: Document | str = row.fault
            if row.fields is not None:
                parsed = parse_row(row.where, row.fields, config)
            if isinstance(parsed, Document):
                yield parsed
                continue
            report.note(row.where, parsed)
            if report.bad % _CHECKED_EVERY == 0:
                report.check(config.max_bad_share, ahead)


def parse_row(where: str, row: dict[str, Any], config: DataConfig) -> Document | str:
    """A row's document, or what is wrong with the row; a null field is as good as absent."""
    name = row.get(config.id_field)
    identity = str(name) if isinstance(name, str | int) and str(name) else where
    messages, prompt, completion = row.get(MESSAGES), row.get(PROMPT), row.get(COMPLETION)
    if messages is not None:
        return _chat_fault(messages) or Document(id=identity, messages=tuple(messages))
    if prompt is not None or completion is not None:
        if not _is_text(prompt) or not _is_text(completion):
            return f"'{PROMPT}' and '{COMPLETION}' must both be text and not empty"
        return Document(id=identity, prompt=prompt, text=str(completion))
    text = row.get(config.text_field)
    if not _is_text(text):
        return f"'{config.text_field}' must be text and not empty"
    return Document(id=identity, text=str(text))


def to_row(document: Document) -> dict[str, Any]:
    """The document as a row that `from_row` reads back: the form of the shards."""
    if document.messages is not None:
        return {"id": document.id, MESSAGES: [dict(message) for message in document.messages]}
    if document.prompt is not None:
        return {"id": document.id, PROMPT: document.prompt, COMPLETION: document.text}
    return {"id": document.id, "text": document.text}


def from_row(row: dict[str, Any]) -> Document:
    """Read back what `to_row` wrote."""
    messages = row.get(MESSAGES)
    return Document(
        id=row["id"],
        text=row.get(COMPLETION, row.get("text", "")),
        prompt=row.get(PROMPT),
        messages=None if messages is None else tuple(messages),
    )


def full_text(document: Document) -> str:
    """Everything the document says, for counting words."""
    if document.messages is not None:
        return "\n".join(message.text for message in chat_messages(list(document.messages)))
    return f"{document.prompt or ''}\n{document.text}".strip()


def routed_text(document: Document, route_on: RouteOn) -> str:
    """What the router sees of the document, as a request would show it.

    A plain text is seen whole, a prompt without its completion, a chat as `route_on` says.
    """
    if document.messages is not None:
        return routing_text(chat_messages(list(document.messages)), route_on)
    return (document.text if document.prompt is None else document.prompt).strip()


def request_of(document: Document) -> list[Message]:
    """The request that the document's last answer would answer, as serving routes it.

    A chat up to its last user turn (whole, if there is no text up to there), otherwise what
    `routed_text` says, as one user turn.
    """
    if document.messages is None:
        return [Message("user", routed_text(document, "last_user"))]
    turns = chat_messages(list(document.messages))
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    asked = turns[: last + 1]
    return asked if any(turn.text for turn in asked) else turns


def content_hash(document: Document) -> bytes:
    """Hash (16 bytes) of the normalised content, alike for documents that count as equal."""
    content = _normal({**to_row(document), "id": ""})
    key = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(key.encode(), digest_size=_HASH_BYTES).digest()


def is_held_out(content: bytes, share: float, seed: int) -> bool:
    """Whether the split puts aside the document of that `content_hash`; the seed decides too."""
    keyed = hashlib.blake2b(content, digest_size=8, key=str(seed).encode())
    return int.from_bytes(keyed.digest()) < share * 2**64


def _normal(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).split())
    if isinstance(value, list):
        return [_normal(item) for item in value]
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _chat_fault(messages: object) -> str:
    try:
        turns = chat_messages(messages)
        routing_text(turns, "conversation")
    except UnroutableError as error:
        return str(error)
    if not any(turn.role == "assistant" for turn in turns):
        return f"'{MESSAGES}' has no assistant turn to learn from"
    return ""
