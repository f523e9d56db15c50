"""The runner, with jobs that do as a test says; and its process."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.schema import RunConfig
from server.batch import runner as module
from server.batch.errors import BatchError, BatchInputError, BatchOutputError
from server.batch.job import write_finished
from server.batch.ledger import Entry, Ledger, Result
from server.batch.records import BatchRecord
from server.batch.runner import Runner
from server.batch.store import Store
from server.batch.types import Counts, JobSpec

Listener = Callable[[Counts], None]


@dataclass
class FakeJobs:
    """Jobs of three lines, one of which fails; each waits for `may_end`."""

    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    specs: list[tuple[str, JobSpec]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    """Raised by the next ones."""
    running: int = 0
    most: int = 0

    async def __call__(
        self, tenant: str, spec: JobSpec, listener: Listener, cancelled: asyncio.Event
    ) -> Counts:
        self.specs.append((tenant, spec))
        spec.work.mkdir(parents=True, exist_ok=True)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            listener(Counts(total=3, done=1))
            if self.errors:
                raise self.errors.pop(0)
            waits = [asyncio.create_task(e.wait()) for e in (self.may_end, cancelled)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            counts = Counts(total=3, done=1) if cancelled.is_set() else Counts(3, 2, 1)
            _write(spec, counts)
            return counts
        finally:
            self.running -= 1


def _write(spec: JobSpec, counts: Counts) -> None:
    Path(spec.output).write_text("answer\n" * counts.done)
    Path(spec.errors).write_text("error\n" * counts.failed)
    spec.work.rmdir()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "scratch" / "batches")
    yield made
    made.close()


def add(store: Store, tenant: str = "alice") -> BatchRecord:
    content = store.new_content()
    content.write_text("{}\n")
    file = store.add_file(tenant, "in.jsonl", content)
    batch = store.add_batch(tenant, endpoint="/v1/route", input_file_id=file.id)
    assert batch is not None
    return batch


def now(store: Store, batch: BatchRecord) -> BatchRecord:
    found = store.batch(batch.tenant, batch.id)
    assert found is not None
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the store has no event for it
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(store: Store, jobs: FakeJobs, at_once: int = 2) -> AsyncIterator[None]:
    runner = Runner(store, jobs, at_once=at_once, look_s=0.01, pause_s=0.01)
    task = asyncio.create_task(runner.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_batches_are_done_the_oldest_first_and_so_many_at_once(store: Store) -> None:
    jobs = FakeJobs()
    batches = [add(store, f"tenant-{i}") for i in range(3)]
    async with running(store, jobs):
        await until(lambda: jobs.running == 2)
        await until(lambda: now(store, batches[1]).total == 3)
        assert {tenant for tenant, _ in jobs.specs} == {"tenant-0", "tenant-1"}
        assert [now(store, b).status for b in batches] == ["in_progress"] * 2 + ["validating"]
        jobs.may_end.set()
        await until(lambda: not store.open_batches())
    assert jobs.most == 2
    for batch in batches:
        over = now(store, batch)
        assert (over.status, over.total, over.done, over.failed) == ("completed", 3, 2, 1)
        assert over.output_file_id
        assert over.error_file_id
        assert store.content_of(over.output_file_id).read_text() == "answer\n" * 2
    spec = dict(jobs.specs)["tenant-0"]
    assert spec.inputs == (str(store.content_of(batches[0].input_file_id)),)
    assert spec.endpoint == "/v1/route"
    assert not any((store.directory / "work").iterdir())


async def test_a_cancelled_batch_keeps_what_is_finished(store: Store) -> None:
    jobs = FakeJobs()
    batch = add(store)
    async with running(store, jobs):
        await until(lambda: jobs.running == 1)
        store.cancel(batch.tenant, batch.id)
        await until(lambda: not store.open_batches())
    over = now(store, batch)
    assert (over.status, over.done) == ("cancelled", 1)
    assert over.output_file_id is not None
    assert over.error_file_id is None
    assert over.cancelling_at is not None


async def test_a_batch_expires(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.batch.store.WINDOW_S", 2)
    jobs = FakeJobs()
    batch = add(store)
    async with running(store, jobs):
        await until(lambda: not store.open_batches())
    over = now(store, batch)
    assert over.status == "expired"
    assert over.expired_at is not None
    assert over.cancelling_at is None


async def test_what_a_job_cannot_do_is_told(store: Store) -> None:
    jobs = FakeJobs(errors=[BatchInputError("there is no input")])
    batch = add(store)
    async with running(store, jobs):
        await until(lambda: not store.open_batches())
    over = now(store, batch)
    assert over.status == "failed"
    assert over.problem is not None
    assert (over.problem.code, over.problem.message) == ("batch_failed", "there is no input")
    assert len(jobs.specs) == 1, "no other try would mend it"


@pytest.mark.parametrize("error", [BatchError("no endpoint answers"), RuntimeError("a defect")])
async def test_what_may_pass_is_tried_again_and_not_for_ever(
    store: Store, error: Exception
) -> None:
    jobs = FakeJobs(errors=[error, error])
    jobs.may_end.set()
    batch = add(store)
    async with running(store, jobs):
        await until(lambda: not store.open_batches())
        assert now(store, batch).status == "completed"
        jobs.errors = [error] * 3
        other = add(store)
        await until(lambda: not store.open_batches())
    over = now(store, other)
    assert over.status == "failed"
    assert over.problem is not None
    assert over.problem.code in ("batch_failed", "internal_error")


def answer_two_of_three(store: Store, batch: BatchRecord) -> None:
    """As a job leaves it that has come so far."""
    with Ledger(store.work_of(batch)) as ledger:
        entries = [Entry(n, 0, n, f"{n}", "/v1/route", "someone") for n in (1, 2, 3)]
        ledger.add(entries)
        ledger.finish([Result(1, True, b"answer"), Result(2, False, b"error")])


async def check_two_of_three(store: Store, batch: BatchRecord) -> None:
    over = now(store, batch)
    assert (over.status, over.total, over.done, over.failed) == ("failed", 3, 1, 1)
    assert over.problem is not None
    assert over.output_file_id
    assert over.error_file_id
    assert store.content_of(over.output_file_id).read_text() == "answer\n"
    assert store.content_of(over.error_file_id).read_text() == "error\n"
    assert store.file(batch.tenant, over.output_file_id) is not None
    await until(lambda: not store.work_of(batch).exists())


async def test_a_failed_batch_keeps_what_was_answered(store: Store) -> None:
    jobs = FakeJobs(errors=[BatchInputError("the input is gone")])
    batch = add(store)
    answer_two_of_three(store, batch)
    async with running(store, jobs):
        await until(lambda: not store.open_batches())
    await check_two_of_three(store, batch)


async def test_what_was_answered_waits_for_room_on_the_disk(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def full_at_first(spec: JobSpec) -> Counts | None:
        tries.append(spec)
        if len(tries) < 3:
            raise BatchOutputError("no room")
        return write_finished(spec)

    monkeypatch.setattr(module, "write_finished", full_at_first)
    jobs = FakeJobs(errors=[BatchOutputError("no room")] * 3)
    batch = add(store)
    answer_two_of_three(store, batch)
    async with running(store, jobs):
        await until(lambda: not store.open_batches())
    assert len(tries) == 3
    await check_two_of_three(store, batch)


async def test_the_next_runner_goes_on_with_the_same_job(store: Store) -> None:
    first, second = FakeJobs(), FakeJobs()
    batch = add(store)
    async with running(store, first):
        await until(lambda: now(store, batch).total == 3)
    assert now(store, batch).status == "in_progress"
    assert store.work_of(batch).exists(), "the ledger stays"
    second.may_end.set()
    async with running(store, second):
        await until(lambda: not store.open_batches())
    assert second.specs == first.specs
    assert now(store, batch).status == "completed"


@pytest.mark.parametrize("before", ["in_progress", "finalizing", "cancelling"])
async def test_a_job_that_was_done_when_its_runner_died_is_not_done_again(
    store: Store, before: str
) -> None:
    jobs = FakeJobs()
    batch = add(store)
    store.begin(batch)
    store.progress(batch, 1, 1, 0)
    store.output_of(batch).write_text("answer\n")
    store.errors_of(batch).touch()
    if before == "finalizing":
        store.finalize(batch)
    elif before == "cancelling":
        store.cancel(batch.tenant, batch.id)
    async with running(store, jobs):
        await until(lambda: not store.open_batches())
    assert not jobs.specs
    over = now(store, batch)
    assert over.status == ("cancelled" if before == "cancelling" else "completed")
    assert over.output_file_id is not None
    assert over.total == 1


async def test_one_that_was_being_cancelled_is_not_begun_anew(store: Store) -> None:
    jobs = FakeJobs()
    batch = add(store)
    store.begin(batch)
    store.cancel(batch.tenant, batch.id)
    async with running(store, jobs):
        await until(lambda: not store.open_batches())
    assert now(store, batch).status == "cancelled"


def test_the_process_ends_with_its_standard_input(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "bundle": {"path": str(tmp_path / "bundle"), "scratch_dir": str(tmp_path / "scratch")},
            "base": {"model": "base"},
            "data": {"train": ["x.jsonl"]},
        }
    )
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "server.batch.runner", "--config", str(file)]
    command += ["--run-dir", str(tmp_path), "--url", "http://127.0.0.1:9"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        told = []
        for process in processes:
            _, text = process.communicate(timeout=120)  # closes its standard input
            told.append(text)
            assert process.returncode == 0, text
        assert all("standard input closed" in text for text in told)
    finally:
        for process in processes:
            process.kill()
            process.wait()
