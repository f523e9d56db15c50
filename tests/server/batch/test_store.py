"""Files and batches on disk."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.batch import store as module
from server.batch.records import BatchRecord, FileRecord, Problem
from server.batch.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "batches")
    yield made
    made.close()


def add(
    store: Store, tenant: str = "alice", text: str = "x\n", name: str = "a.jsonl"
) -> FileRecord:
    content = store.new_content()
    content.write_text(text)
    return store.add_file(tenant, name, content)


def start(store: Store, tenant: str = "alice", **more: object) -> BatchRecord:
    file = add(store, tenant)
    batch = store.add_batch(
        tenant,
        endpoint="/v1/completions",
        input_file_id=file.id,
        **more,  # type: ignore[arg-type]
    )
    assert batch is not None
    return batch


def again(store: Store, batch: BatchRecord) -> BatchRecord:
    found = store.batch(batch.tenant, batch.id)
    assert found is not None
    return found


def test_nothing_is_made_before_it_is_used(tmp_path: Path) -> None:
    Store(tmp_path / "batches").close()
    assert not list(tmp_path.iterdir())


def test_a_file_is_its_tenants(store: Store) -> None:
    file = add(store, text="one\ntwo\n")
    assert (file.bytes, file.filename, file.purpose) == (8, "a.jsonl", "batch")
    assert file.id.startswith("file-")
    assert store.content_of(file.id).read_text() == "one\ntwo\n"
    assert store.file("alice", file.id) == file
    assert store.file("bob", file.id) is None
    assert store.remove_file("bob", file.id) == "unknown"
    assert store.content_of(file.id).exists()
    assert store.remove_file("alice", file.id) == "removed"
    assert store.file("alice", file.id) is None
    assert not store.content_of(file.id).exists()
    assert store.directory.stat().st_mode & 0o777 == 0o700


def test_lists_go_page_by_page(store: Store) -> None:
    files = [add(store, name=f"{i}") for i in range(5)]
    add(store, "bob")
    seen: list[str] = []
    after = None
    while True:
        page = store.files("alice", limit=2, after=after)
        assert page is not None
        seen += [record.filename for record in page.records]
        if not page.more:
            break
        after = page.records[-1].id
    assert seen == ["4", "3", "2", "1", "0"]
    oldest = store.files("alice", limit=2, after=files[1].id, oldest_first=True)
    assert oldest is not None
    assert [record.filename for record in oldest.records] == ["2", "3"]
    assert oldest.more
    assert store.files("bob", limit=2, after=files[0].id) is None, "that is another's"
    made = store.files("alice", limit=9, purpose="batch_output")
    assert made is not None
    assert not made.records


def test_a_batch_from_its_beginning_to_its_end(store: Store) -> None:
    batch = start(store, metadata={"who": "me"})
    assert (batch.status, batch.metadata, batch.total) == ("validating", {"who": "me"}, 0)
    assert batch.expires_at == batch.created_at + 24 * 3600
    assert store.batch("bob", batch.id) is None
    assert store.remove_file("alice", batch.input_file_id) == "in use"
    assert store.begin(batch)
    assert not store.begin(batch)
    assert store.progress(batch, 3, 1, 1) == "in_progress"
    store.work_of(batch).mkdir()
    store.output_of(batch).write_text("{}\n")
    store.errors_of(batch).write_text("no\n")
    assert store.finalize(batch)
    assert [b.status for b in store.open_batches()] == ["finalizing"]
    store.finish(batch, "completed")
    over = again(store, batch)
    assert (over.status, over.total, over.done, over.failed) == ("completed", 3, 1, 1)
    assert None not in (over.in_progress_at, over.finalizing_at, over.completed_at)
    assert (over.failed_at, over.cancelled_at, over.expired_at) == (None, None, None)
    assert over.output_file_id
    assert over.error_file_id
    made = store.file("alice", over.output_file_id)
    assert made is not None
    assert (made.purpose, made.bytes) == ("batch_output", 3)
    assert store.content_of(over.error_file_id).read_text() == "no\n"
    assert store.file("bob", over.output_file_id) is None
    assert not store.open_batches()
    assert not store.work_of(batch).exists()
    assert store.remove_file("alice", batch.input_file_id) == "removed"


def test_without_error_lines_there_is_no_file_of_them(store: Store) -> None:
    batch = start(store)
    store.begin(batch)
    store.output_of(batch).write_text("{}\n")
    store.errors_of(batch).touch()
    store.finish(batch, "completed")
    assert again(store, batch).error_file_id is None
    assert not store.errors_of(batch).exists()


def test_a_batch_needs_a_file_that_was_sent_for_it(store: Store) -> None:
    other = add(store, "bob")
    batch = start(store)
    store.output_of(batch).write_text("{}\n")
    store.finish(batch, "completed")
    made = again(store, batch).output_file_id
    assert made is not None
    for file_id in ("file-nothing", other.id, made):
        assert store.add_batch("alice", endpoint="/v1/completions", input_file_id=file_id) is None


def test_cancelling(store: Store) -> None:
    waiting, running, over = start(store), start(store), start(store)
    store.begin(running)
    store.begin(over)
    store.finalize(over)
    assert store.cancel("bob", running.id) is None
    assert again(store, running).status == "in_progress"
    statuses = []
    for batch in (waiting, running, over):
        cancelled = store.cancel("alice", batch.id)
        assert cancelled is not None
        statuses.append(cancelled.status)
    assert statuses == ["cancelled", "cancelling", "finalizing"]
    assert not store.begin(waiting)
    assert not store.finalize(running)
    assert store.progress(running, 2, 1, 0) == "cancelling"
    store.finish(running, "cancelled")
    assert again(store, running).cancelled_at is not None


def test_a_failed_batch_says_why_and_leaves_nothing(store: Store) -> None:
    batch = start(store)
    store.begin(batch)
    store.work_of(batch).mkdir()
    store.output_of(batch).touch()
    store.fail(batch, Problem("batch_failed", "no input"))
    over = again(store, batch)
    assert over.status == "failed"
    assert over.problem == Problem("batch_failed", "no input")
    assert over.failed_at is not None
    assert not store.output_of(batch).exists()
    assert not store.work_of(batch).exists()


def test_a_failed_batch_keeps_what_it_has_written(store: Store) -> None:
    batch = start(store)
    store.begin(batch)
    store.output_of(batch).write_text("{}\n")
    store.errors_of(batch).touch()
    store.fail(batch, Problem("batch_failed", "no endpoint"))
    over = again(store, batch)
    assert over.output_file_id is not None
    assert over.error_file_id is None
    made = store.file("alice", over.output_file_id)
    assert made is not None
    assert made.bytes == 3


def test_a_file_that_has_expired_goes_when_no_batch_reads_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = [store.new_content() for _ in range(3)]
    for path in content:
        path.touch()
    stays = store.add_file("alice", "a", content[0])
    read, unread = (store.add_file("alice", "b", path, lives_s=3600) for path in content[1:])
    assert read.expires_at == read.created_at + 3600
    batch = store.add_batch("alice", endpoint="/v1/route", input_file_id=read.id)
    assert batch is not None
    store.sweep()
    assert store.file("alice", unread.id) == unread
    later = module._now() + 4000
    monkeypatch.setattr(module, "_now", lambda: later)
    page = store.files("alice", limit=9)
    assert page is not None
    assert page.records == [stays]
    assert store.file("alice", read.id) is None
    assert store.add_batch("alice", endpoint="/v1/route", input_file_id=read.id) is None
    store.sweep()
    there = [store.content_of(file.id).exists() for file in (stays, read, unread)]
    assert there == [True, True, False]
    store.cancel("alice", batch.id)
    store.sweep()
    assert not store.content_of(read.id).exists()


def test_a_database_of_the_first_version_is_made_one_of_this(store: Store) -> None:
    file = add(store)
    store.close()
    with sqlite3.connect(store.directory / "batches.db") as database:
        database.execute("ALTER TABLE files DROP COLUMN expires_at")
        database.execute("PRAGMA user_version = 1")
    database.close()
    assert store.file("alice", file.id) == file
    add(store)


def test_a_full_disk_spoils_nothing(store: Store) -> None:
    add(store)
    database = store._database
    assert database is not None
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        add(store, name="x" * 100_000)
    assert len(list((store.directory / "files").iterdir())) == 1, "no content without its file"
    database.execute(f"PRAGMA max_page_count = {pages + 1000}")
    add(store, name="x" * 100_000)


def test_uploads_that_nobody_finishes_go_in_time(store: Store) -> None:
    old, new = store.new_content(), store.new_content()
    for part in (old, new):
        part.touch()
    before = time.time() - module.STALE_S - 60
    os.utime(old, (before, before))
    store.sweep()
    assert not old.exists()
    assert new.exists()


def test_a_ledger_that_a_killed_runner_left_goes_in_time(store: Store) -> None:
    over, running = start(store), start(store)
    store.begin(running)
    store.finish(over, "cancelled")
    for batch in (over, running):
        store.work_of(batch).mkdir()
    store.sweep()
    assert not store.work_of(over).exists()
    assert store.work_of(running).exists()


WRITER = """
import sys
from pathlib import Path
from server.batch.store import Store
store = Store(Path(sys.argv[1]))
for number in range(40):
    content = store.new_content()
    content.write_text(str(number))
    file = store.add_file(sys.argv[2], f"{number}", content)
    batch = store.add_batch(sys.argv[2], endpoint="/v1/route", input_file_id=file.id)
    store.begin(batch)
    for batch in store.open_batches():
        store.progress(batch, 1, 1, 0)
store.close()
"""


def test_several_processes_use_it_at_once(store: Store) -> None:
    """From its making on: the first to come makes the database."""
    names = ["a", "b", "c"]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(store.directory), name])
        for name in names
    ]
    try:
        assert [writer.wait(240) for writer in writers] == [0, 0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    for name in names:
        page = store.files(name, limit=100)
        assert page is not None
        assert [r.filename for r in page.records] == [str(i) for i in reversed(range(40))]
    assert len(store.open_batches()) == 120


def test_what_is_written_is_there_for_the_next(store: Store) -> None:
    batch = start(store)
    store.close()
    other = Store(store.directory)
    try:
        assert [b.id for b in other.open_batches()] == [batch.id]
    finally:
        other.close()


def test_a_database_of_a_newer_version_is_left_alone(store: Store) -> None:
    start(store)
    store.close()
    with sqlite3.connect(store.directory / "batches.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(sqlite3.DatabaseError, match="newer version"):
        store.open_batches()
