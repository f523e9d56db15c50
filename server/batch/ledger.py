"""The ledger of a job: every line of the input, who is to answer it, and what came of it.

One SQLite file in the job's work directory. A transaction holds either rows of the input together
with how far it has been read, or finished lines, so that a process that is killed at any moment
leaves a ledger from which the next one goes on: no line is read twice, no finished one asked again.
Memory does not grow with the job. Knows nothing of who answers.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from server.batch.errors import BatchBusyError, BatchError
from server.batch.types import Line

LEDGER_FILE = "ledger.sqlite"
LOCK_FILE = "lock"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lines (
    number INTEGER PRIMARY KEY,
    file INTEGER NOT NULL,
    line INTEGER NOT NULL,
    custom_id TEXT,
    path TEXT,
    target TEXT,
    score REAL,
    body BLOB,
    pending INTEGER NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS lines_by_id ON lines (custom_id) WHERE custom_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS lines_to_ask ON lines (target, number) WHERE pending;
CREATE TABLE IF NOT EXISTS results (
    place INTEGER PRIMARY KEY,
    number INTEGER NOT NULL UNIQUE,
    ok INTEGER NOT NULL,
    content BLOB NOT NULL
);
"""
_MOST_VARIABLES = 500


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the input as it enters the ledger."""

    number: int
    file: int
    line: int
    custom_id: str | None
    """None where it has no right to one: another line has it, or it could not be read."""
    path: str = ""
    target: str = ""
    score: float | None = None
    body: bytes = b""
    result: tuple[bool, bytes] | None = None
    """What came of it already: whether it is an answer, and the line to be written."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a line."""

    number: int
    ok: bool
    content: bytes


class Ledger:
    """The ledger in a work directory, from `open` to `close`; a context manager."""

    def __init__(self, directory: Path) -> None:
        """Name the directory; nothing is opened yet."""
        self._directory = directory
        self._db: sqlite3.Connection | None = None
        self._lock = -1

    def __enter__(self) -> Self:
        """Open it, or begin a new one.

        Raises:
            BatchBusyError: another process has it open.
            BatchError: it cannot be written or read.
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise BatchBusyError(
                f"another process works on this batch ({self._directory}); wait for it or end it"
            ) from None
        except OSError as error:
            raise BatchError(
                f"{self._directory} cannot be written: {error.strerror}; the batch keeps its "
                "ledger there"
            ) from None
        with self._explained():
            self._db = sqlite3.connect(self._directory / LEDGER_FILE, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it; another process may open it then."""
        if self._db is not None:
            self._db.close()
            self._db = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def fact(self, name: str) -> str | None:
        """What was noted under a name."""
        row = self._all("SELECT value FROM facts WHERE name = ?", (name,))
        return str(row[0][0]) if row else None

    def note(self, **facts: str) -> None:
        """Note some facts."""
        with self._transaction() as db:
            _note(db, facts)

    def add(self, entries: Sequence[Entry], **facts: str) -> None:
        """Take in rows of the input and note how far it has been read, both or neither."""
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO lines VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (e.number, e.file, e.line, e.custom_id, e.path, e.target, e.score, e.body,
                     e.result is None)
                    for e in entries
                ],
            )  # fmt: skip
            _put(db, [Result(e.number, *e.result) for e in entries if e.result is not None])
            _note(db, facts)

    def finish(self, results: Sequence[Result]) -> None:
        """Lines that are over; one that was already is left as it is."""
        with self._transaction() as db:
            _put(db, results)
            db.executemany(
                "UPDATE lines SET pending = 0, body = NULL WHERE number = ?",
                [(result.number,) for result in results],
            )

    def retarget(self, line: Line) -> None:
        """Have another answer a line."""
        with self._transaction() as db:
            db.execute(
                "UPDATE lines SET target = ?, score = ? WHERE number = ?",
                (line.target, line.score, line.number),
            )

    def known_ids(self, custom_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Those of the ids that lines have, with file and line."""
        found: dict[str, tuple[int, int]] = {}
        for first in range(0, len(custom_ids), _MOST_VARIABLES):
            some = custom_ids[first : first + _MOST_VARIABLES]
            marks = ",".join("?" * len(some))
            query = f"SELECT custom_id, file, line FROM lines WHERE custom_id IN ({marks})"
            found |= {row[0]: (row[1], row[2]) for row in self._all(query, some)}
        return found

    def remaining(self) -> dict[str, int]:
        """Lines that are to be asked, by target."""
        query = "SELECT target, COUNT(*) FROM lines WHERE pending GROUP BY target"
        return {str(target): int(count) for target, count in self._all(query)}

    def totals(self) -> dict[str, int]:
        """All lines that have a target, by it."""
        query = "SELECT target, COUNT(*) FROM lines WHERE target != '' GROUP BY target"
        return {str(target): int(count) for target, count in self._all(query)}

    def to_ask(self, target: str, after: int, limit: int) -> list[Line]:
        """The next lines for a target, by number."""
        rows = self._all(
            "SELECT number, file, line, custom_id, path, target, body, score FROM lines "
            "WHERE pending AND target = ? AND number > ? ORDER BY number LIMIT ?",
            (target, after, limit),
        )
        return [Line(*row) for row in rows]

    def counts(self) -> tuple[int, int, int]:
        """Lines, answers, error lines."""
        ((lines,),) = self._all("SELECT COUNT(*) FROM lines")
        ((ok, bad),) = self._all(
            "SELECT COALESCE(SUM(ok), 0), COALESCE(SUM(NOT ok), 0) FROM results"
        )
        return int(lines), int(ok), int(bad)

    def contents(self, *, ok: bool, in_order: bool) -> Iterator[bytes]:
        """Lines to be written: answers or errors, by number or as they came."""
        order = "number" if in_order else "place"
        query = f"SELECT content FROM results WHERE ok = ? ORDER BY {order}"
        with self._explained():
            for (content,) in self._connection.execute(query, (ok,)):
                yield content

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._db, "it has been entered"
        return self._db

    def _all(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._explained():
            return self._connection.execute(query, tuple(values)).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._connection
        with self._explained():
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk has ended it already
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise BatchError(
                f"the ledger in {self._directory} cannot be used: {error}; see that its disk has "
                "room, and give the same command again: what is finished stands"
            ) from error


def _note(db: sqlite3.Connection, facts: Mapping[str, str]) -> None:
    db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))


def _put(db: sqlite3.Connection, results: Sequence[Result]) -> None:
    db.executemany(
        "INSERT OR IGNORE INTO results (number, ok, content) VALUES (?, ?, ?)",
        [(result.number, result.ok, result.content) for result in results],
    )
