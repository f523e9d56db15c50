"""A corpus on local disk: documents in the order they were read, any of them found by its number.

A later pass reads here what one pass over files, stores or a hub has brought, and holds no more of
it than the documents at hand. One file of JSON lines and one of the lines' places: 24 bytes of
disk a document beside its text, and in memory 8 for each number that a caller holds. Knows nothing
of what is done with the documents.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from expert_trainer.corpus import content_hash, from_row
from expert_trainer.errors import StorageError
from expert_trainer.shards import row_bytes
from expert_trainer.types import Document

Numbers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

STAGED_PREFIX = ".fit-"
_TEXTS, _OFFSETS, _HASHES = "documents.jsonl", "offsets", "hashes"
_HASH_WORDS = 2
_BUFFER_BYTES = 1 << 20


class Spool:
    """Documents on disk, numbered from 0; cheap to make and to send to a process of this machine.

    `SpoolWriter` writes it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """Where it lies, on this machine."""

    def __len__(self) -> int:
        return (self.directory / _OFFSETS).stat().st_size // 8 - 1

    @property
    def offsets(self) -> Numbers:
        """Where each line begins, and the end: bytes, shape (N + 1,), memory-mapped."""
        return np.memmap(self.directory / _OFFSETS, dtype=np.int64, mode="r")

    @property
    def hashes(self) -> Hashes:
        """`content_hash` of each document as two numbers, shape (N, 2), memory-mapped."""
        if not len(self):
            return np.empty((0, _HASH_WORDS), dtype=np.uint64)
        mapped = np.memmap(self.directory / _HASHES, dtype=np.uint64, mode="r")
        return mapped.reshape(-1, _HASH_WORDS)

    def lines(self, numbers: Iterable[int]) -> Iterator[bytes]:
        """The rows of some documents as JSON lines, in the order of their numbers given."""
        offsets = self.offsets
        with (self.directory / _TEXTS).open("rb", buffering=_BUFFER_BYTES) as file:
            place = 0
            for number in numbers:
                begin, end = int(offsets[number]), int(offsets[number + 1])
                if begin != place:
                    file.seek(begin)
                yield file.read(end - begin)
                place = end

    def documents(self, numbers: Iterable[int] | None = None) -> Iterator[Document]:
        """Some documents, or all, in the order of their numbers given."""
        for line in self.lines(range(len(self)) if numbers is None else numbers):
            yield from_row(json.loads(line))


class SpoolWriter:
    """Writes a spool into an empty or missing directory; it is there once the context ends."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._files: list[IO[bytes]] = []
        self._place = 0
        self._count = 0

    def __enter__(self) -> Self:
        self._files = [
            (self._directory / name).open("wb", buffering=_BUFFER_BYTES)
            for name in (_TEXTS, _OFFSETS, _HASHES)
        ]
        self._files[1].write(self._place.to_bytes(8, "little"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()

    def extend(self, documents: Iterable[Document]) -> Numbers:
        """Append documents; returns their numbers."""
        texts, offsets, hashes = self._files
        first = self._count
        for document in documents:
            line = row_bytes(document)
            self._place += texts.write(line)
            offsets.write(self._place.to_bytes(8, "little"))
            hashes.write(content_hash(document))
            self._count += 1
        return np.arange(first, self._count)

    @property
    def spool(self) -> Spool:
        """What was written, once the context has ended."""
        return Spool(self._directory)


@contextmanager
def scratch_directory(root: Path) -> Iterator[Path]:
    """A directory in `root` that is gone when the context ends, in whatever way.

    Those of processes that were killed are removed first: a lock, which the system releases with
    its process, tells them from those at work.

    Raises:
        StorageError: the disk is full.
    """
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{STAGED_PREFIX}*"):
        with _owned(left) as mine:
            if mine:
                shutil.rmtree(left, ignore_errors=True)
    directory = root / f"{STAGED_PREFIX}{uuid.uuid4().hex}"
    directory.mkdir()
    with _owned(directory) as mine:
        assert mine, "nobody else knows of it"
        try:
            yield directory
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageError(
                f"{root} has no room left for working files, which take about as much as the "
                "corpus; make room or name another directory in bundle.scratch_dir",
                reason=error.strerror or "no space left",
            ) from None
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _owned(directory: Path) -> Iterator[bool]:
    """Try to lock a directory while the context lasts; tells whether that worked."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
