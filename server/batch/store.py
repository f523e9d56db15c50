"""Files and batches as the HTTP API knows them, kept on disk: what survives every restart.

    batches.db     who has which files and batches, and where these stand
    files/         the files' contents, each whole at once
    work/          ledgers of the jobs that run

Used by all gateway processes and the runner at the same time. Whatever a tenant asks about is
looked up under its name: of others' files and batches it sees nothing. Calls block, for
milliseconds as a rule; they are for threads. Knows nothing of HTTP, nor of how a batch is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from server.batch.database import open_database
from server.batch.records import (
    OPEN,
    BatchRecord,
    FileRecord,
    Page,
    Problem,
    Record,
    Status,
)

DIRECTORY = "batches"
"""Under a run's scratch directory."""
DATABASE = "batches.db"
WINDOW_S = 24 * 3600
"""From a batch's creation to its expiry."""
STALE_S = 24 * 3600.0
"""Age of an unfinished upload that nobody will finish."""
Removal = Literal["removed", "unknown", "in use"]

_FILE = ", ".join(field.name for field in fields(FileRecord))
_ALIVE = "(expires_at IS NULL OR expires_at > ?)"
"""Of a file, as long as it has not expired."""
_BATCH = ", ".join(field.name for field in fields(BatchRecord))


class Store:
    """All files and batches of one run; safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        """Describe it; nothing is opened or made before it is used."""
        self._directory = directory.resolve()
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    @property
    def directory(self) -> Path:
        """Where everything lies."""
        return self._directory

    def close(self) -> None:
        """Let go of the database, if it was used."""
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    # -- files

    def content_of(self, file_id: str) -> Path:
        """Where the content of a file lies."""
        return self._directory / "files" / f"{file_id}.jsonl"

    def new_content(self) -> Path:
        """A place for a content that is still to come: taken over by `add_file`, else for whoever
        asked to remove."""
        with self._lock:
            self._opened()
        return self._directory / "files" / f".{secrets.token_hex(12)}.part"

    def add_file(
        self, tenant: str, filename: str, content: Path, lives_s: int | None = None
    ) -> FileRecord:
        """Take over a content that was sent for a batch, for so many seconds or for ever."""
        now = _now()
        record = FileRecord(
            id=f"file-{secrets.token_hex(12)}",
            tenant=tenant,
            filename=filename,
            purpose="batch",
            bytes=content.stat().st_size,
            created_at=now,
            expires_at=None if lives_s is None else now + lives_s,
        )
        place = content.replace(self.content_of(record.id))
        try:
            with self._writing() as database:
                _insert_file(database, record)
        except BaseException:
            place.unlink()
            raise
        return record

    def file(self, tenant: str, file_id: str) -> FileRecord | None:
        """A tenant's file; none where it has none of this id."""
        with self._reading() as database:
            row = database.execute(
                f"SELECT {_FILE} FROM files WHERE id = ? AND tenant = ? AND {_ALIVE}",
                (file_id, tenant, _now()),
            ).fetchone()
        return FileRecord(**dict(row)) if row else None

    def files(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        oldest_first: bool = False,
    ) -> Page[FileRecord] | None:
        """A tenant's files, the newest first unless it is said otherwise; none where it has no file
        of the id `after`."""
        rows = self._rows(
            "files",
            _FILE,
            tenant,
            limit=limit,
            after=after,
            purpose=purpose,
            oldest_first=oldest_first,
        )
        return None if rows is None else _page([FileRecord(**row) for row in rows], limit)

    def remove_file(self, tenant: str, file_id: str) -> Removal:
        """Remove a tenant's file, unless a batch that is not over reads it."""
        with self._writing() as database:
            marks = ", ".join("?" * len(OPEN))
            if database.execute(
                f"SELECT 1 FROM batches WHERE input_file_id = ? AND tenant = ? "
                f"AND status IN ({marks})",
                (file_id, tenant, *OPEN),
            ).fetchone():
                return "in use"
            removed = database.execute(
                "DELETE FROM files WHERE id = ? AND tenant = ?", (file_id, tenant)
            ).rowcount
        if not removed:
            return "unknown"
        self.content_of(file_id).unlink(missing_ok=True)
        return "removed"

    # -- batches, as those who ask for them see them

    def add_batch(
        self,
        tenant: str,
        *,
        endpoint: str,
        input_file_id: str,
        metadata: Mapping[str, str] | None = None,
    ) -> BatchRecord | None:
        """A new batch of a tenant's file; none where it has no file of this id for batches."""
        batch_id = f"batch_{secrets.token_hex(16)}"
        now = _now()
        with self._writing() as database:
            if not database.execute(
                "SELECT 1 FROM files WHERE id = ? AND tenant = ? AND purpose = 'batch' "
                f"AND {_ALIVE}",
                (input_file_id, tenant, now),
            ).fetchone():
                return None
            database.execute(
                "INSERT INTO batches (id, tenant, endpoint, input_file_id, status, created_at, "
                "expires_at, metadata) VALUES (?, ?, ?, ?, 'validating', ?, ?, ?)",
                (
                    batch_id,
                    tenant,
                    endpoint,
                    input_file_id,
                    now,
                    now + WINDOW_S,
                    None if metadata is None else json.dumps(dict(metadata)),
                ),
            )
            return _batch(database, batch_id)

    def batch(self, tenant: str, batch_id: str) -> BatchRecord | None:
        """A tenant's batch; none where it has none of this id."""
        with self._reading() as database:
            found = _batch(database, batch_id)
        return found if found is not None and found.tenant == tenant else None

    def batches(
        self, tenant: str, *, limit: int, after: str | None = None
    ) -> Page[BatchRecord] | None:
        """A tenant's batches, the newest first; none where it has no batch of the id `after`."""
        rows = self._rows("batches", _BATCH, tenant, limit=limit, after=after)
        return None if rows is None else _page([_batch_of(row) for row in rows], limit)

    def cancel(self, tenant: str, batch_id: str) -> BatchRecord | None:
        """Have a tenant's batch end before its time, unless it is over or all but over; none where
        there is none of this id. One that nobody has begun is over at once."""
        now = _now()
        with self._writing() as database:
            whose = (batch_id, tenant)
            database.execute(
                "UPDATE batches SET status = 'cancelling', cancelling_at = ? "
                "WHERE id = ? AND tenant = ? AND status = 'in_progress'",
                (now, *whose),
            )
            database.execute(
                "UPDATE batches SET status = 'cancelled', cancelling_at = ?, cancelled_at = ? "
                "WHERE id = ? AND tenant = ? AND status = 'validating'",
                (now, now, *whose),
            )
        return self.batch(tenant, batch_id)

    # -- batches, as the runner sees them

    def open_batches(self) -> list[BatchRecord]:
        """All that are not over, the oldest first."""
        marks = ", ".join("?" * len(OPEN))
        with self._reading() as database:
            rows = database.execute(
                f"SELECT {_BATCH} FROM batches WHERE status IN ({marks}) ORDER BY number", OPEN
            ).fetchall()
        return [_batch_of(dict(row)) for row in rows]

    def work_of(self, batch: BatchRecord) -> Path:
        """The directory of its job."""
        return self._directory / "work" / batch.id

    def output_of(self, batch: BatchRecord) -> Path:
        """Where its answers are to be written."""
        return self.content_of(_made_id(batch, "output"))

    def errors_of(self, batch: BatchRecord) -> Path:
        """Where its error lines are to be written."""
        return self.content_of(_made_id(batch, "errors"))

    def begin(self, batch: BatchRecord) -> bool:
        """Say that it is in progress; false if it was cancelled meanwhile."""
        return self._move(batch, ("validating",), "in_progress")

    def progress(self, batch: BatchRecord, total: int, done: int, failed: int) -> Status:
        """Write down where it stands; its status, which others may have changed."""
        with self._writing() as database:
            (status,) = database.execute(
                "UPDATE batches SET total = ?, done = ?, failed = ? WHERE id = ? RETURNING status",
                (total, done, failed, batch.id),
            ).fetchone()
        known: Status = status
        return known

    def finalize(self, batch: BatchRecord) -> bool:
        """Say that its lines are done; false if it was cancelled meanwhile."""
        return self._move(batch, ("in_progress",), "finalizing")

    def finish(
        self,
        batch: BatchRecord,
        status: Literal["completed", "cancelled", "expired", "failed"],
        problem: Problem | None = None,
    ) -> None:
        """It is over: what it has written is a tenant's file from now on, error lines if there
        are any, and answers, where it has failed, if there are any."""
        now = _now()
        told = problem and json.dumps([problem.code, problem.message, problem.line, problem.param])
        made: dict[str, str | None] = {"output": None, "errors": None}
        with self._writing() as database:
            for what in made:
                file_id = _made_id(batch, what)
                content = self.content_of(file_id)
                size = content.stat().st_size if content.exists() else None
                if size is None or (not size and (what == "errors" or status == "failed")):
                    continue
                made[what] = file_id
                name = f"{batch.id}_{what}.jsonl"
                record = FileRecord(file_id, batch.tenant, name, "batch_output", size, now)
                _insert_file(database, record)
            database.execute(
                f"UPDATE batches SET status = ?, {status}_at = ?, output_file_id = ?, "
                "error_file_id = ?, problem = ? WHERE id = ?",
                (status, now, made["output"], made["errors"], told, batch.id),
            )
        for what in [what for what, file_id in made.items() if file_id is None]:
            self.content_of(_made_id(batch, what)).unlink(missing_ok=True)
        shutil.rmtree(self.work_of(batch), ignore_errors=True)

    def fail(self, batch: BatchRecord, problem: Problem) -> None:
        """It is over before its lines are."""
        self.finish(batch, "failed", problem)

    def sweep(self) -> None:
        """Remove uploads that were never finished, ledgers of batches that are over, and files that
        have expired and that no batch reads any more."""
        works = list((self._directory / "work").glob("*"))  # before: no new one is among them
        running = {batch.id for batch in self.open_batches()}
        for work in works:
            if work.name not in running:
                shutil.rmtree(work, ignore_errors=True)
        marks = ", ".join("?" * len(OPEN))
        with self._writing() as database:
            expired = database.execute(
                "DELETE FROM files WHERE expires_at <= ? AND id NOT IN "
                f"(SELECT input_file_id FROM batches WHERE status IN ({marks})) RETURNING id",
                (_now(), *OPEN),
            ).fetchall()
        for row in expired:
            self.content_of(row["id"]).unlink(missing_ok=True)
        for part in (self._directory / "files").glob(".*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > STALE_S:
                    part.unlink()

    # -- the database

    def _move(self, batch: BatchRecord, before: tuple[Status, ...], after: Status) -> bool:
        marks = ", ".join("?" * len(before))
        with self._writing() as database:
            changed = database.execute(
                f"UPDATE batches SET status = ?, {after}_at = ? "
                f"WHERE id = ? AND status IN ({marks})",
                (after, _now(), batch.id, *before),
            ).rowcount
        return bool(changed)

    def _rows(
        self,
        table: Literal["files", "batches"],
        columns: str,
        tenant: str,
        *,
        limit: int,
        after: str | None,
        purpose: str | None = None,
        oldest_first: bool = False,
    ) -> list[dict[str, Any]] | None:
        """One more row than `limit`, if there are so many; none where `after` is not known."""
        where: list[str] = ["tenant = ?"]
        values: list[str | int] = [tenant]
        if table == "files":
            where.append(_ALIVE)
            values.append(_now())
        if purpose is not None:
            where.append("purpose = ?")
            values.append(purpose)
        with self._reading() as database:
            if after is not None:
                known = database.execute(
                    f"SELECT number FROM {table} WHERE id = ? AND tenant = ?", (after, tenant)
                ).fetchone()
                if known is None:
                    return None
                where.append(f"number {'>' if oldest_first else '<'} ?")
                values.append(known["number"])
            rows = database.execute(
                f"SELECT {columns} FROM {table} WHERE {' AND '.join(where)} "
                f"ORDER BY number {'ASC' if oldest_first else 'DESC'} LIMIT ?",
                (*values, limit + 1),
            ).fetchall()
        return [dict(row) for row in rows]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            yield self._opened()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that has the right to write from its beginning: one that only asked for it
        later could be refused, however long it waited."""
        with self._lock:
            database = self._opened()
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:  # a full disk has ended it already
                    database.execute("ROLLBACK")
                raise

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._directory.chmod(0o700)  # what tenants ask, and what they were answered
            for name in ("files", "work"):
                (self._directory / name).mkdir(exist_ok=True)
            # one at a time: the change to WAL waits for nobody, whatever the timeout
            with (self._directory / ".opening.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._database = open_database(self._directory / DATABASE)
        return self._database


def _insert_file(database: sqlite3.Connection, record: FileRecord) -> None:
    values = [getattr(record, field.name) for field in fields(FileRecord)]
    marks = ", ".join("?" * len(values))
    database.execute(f"INSERT INTO files ({_FILE}) VALUES ({marks})", values)


def _batch(database: sqlite3.Connection, batch_id: str) -> BatchRecord | None:
    row = database.execute(f"SELECT {_BATCH} FROM batches WHERE id = ?", (batch_id,)).fetchone()
    return _batch_of(dict(row)) if row else None


def _batch_of(row: dict[str, Any]) -> BatchRecord:
    problem, metadata = row["problem"], row["metadata"]
    row["problem"] = Problem(*json.loads(problem)) if problem else None
    row["metadata"] = None if metadata is None else json.loads(metadata)
    return BatchRecord(**row)


def _page(records: Sequence[Record], limit: int) -> Page[Record]:
    return Page(records[:limit], more=len(records) > limit)


def _made_id(batch: BatchRecord, what: str) -> str:
    """Id of a file that a batch makes: the same whichever runner finishes it."""
    return f"file-{hashlib.sha256(f'{batch.id} {what}'.encode()).hexdigest()[:24]}"


def _now() -> int:
    return int(time.time())
