"""Shards: files of documents, one for each cluster, and the sorting of a corpus into them.

Knows nothing of how clusters come about or of what is learnt from the documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from expert_trainer.corpus import from_row, to_row
from expert_trainer.errors import ExpertError, StorageError
from expert_trainer.storage import Storage
from expert_trainer.types import Document

BUFFER_BYTES = 32 << 20


@dataclass(frozen=True)
class Shard:
    """One file of documents."""

    directory: Storage
    name: str
    sha256: str

    def read(self) -> bytes:
        """Its content, verified.

        Raises:
            ExpertError: it is missing or not what the fit wrote.
        """
        try:
            content = self.directory.read(self.name)
        except FileNotFoundError:
            raise ExpertError(
                f"{self.directory}/{self.name} is missing; run `introvert fit` again"
            ) from None
        except StorageError as error:
            raise ExpertError(f"{self.name}: {error}; run `introvert fit` again") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ExpertError(
                f"{self.directory}/{self.name} was changed after the fit; run `introvert fit` again"
            )
        return content

    def documents(self) -> Iterator[Document]:
        """Its documents, in order; raises as `read` does."""
        return (from_row(json.loads(line)) for line in self.read().splitlines())


def row_bytes(document: Document, **more: object) -> bytes:
    """The document's line in a shard; `more` fields are not read back."""
    return json.dumps(to_row(document) | more, ensure_ascii=False).encode() + b"\n"


def write_shard(directory: Storage, name: str, documents: Iterable[Document]) -> Shard:
    """Write documents that fit in memory as a shard."""
    content = b"".join(map(row_bytes, documents))
    directory.write(name, content)
    return Shard(directory, name, hashlib.sha256(content).hexdigest())


class Sorter:
    """Puts rows into local files by name, thousands of them at once, in bounded memory.

    Rows wait until all of them together are too many, and then go to the ends of their files. So
    no file stays open, and each is opened once for many rows.
    """

    def __init__(self, directory: Path, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._buffer_bytes = buffer_bytes
        self._waiting: dict[str, list[bytes]] = {}
        self.waiting_bytes = 0
        """Bytes of the rows that wait in memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()

    def put(self, name: str, line: bytes) -> None:
        """Add a line to a file."""
        self._waiting.setdefault(name, []).append(line)
        self.waiting_bytes += len(line)
        if self.waiting_bytes >= self._buffer_bytes:
            self._flush()

    def _flush(self) -> None:
        for name, lines in self._waiting.items():
            with (self._directory / name).open("ab") as file:
                file.writelines(lines)
        self._waiting, self.waiting_bytes = {}, 0
