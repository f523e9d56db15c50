"""The runner of the batches that came by HTTP: `python -m server.batch.runner`.

Takes what the store has, the oldest first, and has a few done at the same time by asking the
gateway behind all that is asked there now. Whatever it holds in memory can be lost: killed and
started again it goes on with the same batches. Ends when its standard input closes, since then the
process that started it is gone or asks for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from configs.schema import RunConfig
from server.batch.endpoint import EndpointBackend
from server.batch.errors import BatchError
from server.batch.job import run_job, write_finished
from server.batch.records import BatchRecord, Problem
from server.batch.store import DIRECTORY, Store
from server.batch.types import Counts, JobSpec
from server.gateway.tenants import ON_BEHALF
from server.table import ENGINE_KEY_FILE, TABLE_FILE, read_table

logger = logging.getLogger("server.batch.runner")

LOOK_S = 0.5
"""Between two looks at the store."""
SWEEP_S = 60.0
"""Between two looks for what nobody needs any more."""
ATTEMPTS = 3
"""Times that a batch is tried before it has failed, where another try might do."""
PAUSE_S = 5.0
"""Before the second try, doubled before the next."""
LONGEST_PAUSE_S = 600.0
USAGE_ERROR = 2
"""Exit code of errors that no other try would mend."""


class Work(Protocol):
    """Does one job for a tenant; see `server.batch.job.run_job`."""

    async def __call__(
        self,
        tenant: str,
        spec: JobSpec,
        listener: Callable[[Counts], None],
        cancelled: asyncio.Event,
    ) -> Counts:
        """Where it stood in the end."""
        ...


class Runner:
    """The batches of one store, until it is cancelled."""

    def __init__(
        self,
        store: Store,
        work: Work,
        *,
        at_once: int,
        look_s: float = LOOK_S,
        pause_s: float = PAUSE_S,
    ) -> None:
        """Describe it; nothing is done yet.

        Args:
            store: of which no other runner takes batches.
            work: does a job.
            at_once: batches in hand at the most.
            look_s: seconds between two looks at the store.
            pause_s: seconds before a failed batch is tried again.
        """
        self._store = store
        self._work = work
        self._at_once = at_once
        self._look_s = look_s
        self._pause_s = pause_s
        self._failures: dict[str, int] = {}
        self._rests_until: dict[str, float] = {}

    async def run(self) -> None:
        """For ever."""
        running: dict[str, asyncio.Task[None]] = {}
        swept = -SWEEP_S
        try:
            while True:
                if time.monotonic() - swept >= SWEEP_S:
                    swept = time.monotonic()
                    await self._sweep()
                for batch in await self._open():
                    if len(running) >= self._at_once:
                        break
                    if batch.id not in running and self._rested(batch):
                        running[batch.id] = asyncio.create_task(self._do(batch))
                await asyncio.sleep(self._look_s)
                for batch_id in [known for known, task in running.items() if task.done()]:
                    del running[batch_id]
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def _sweep(self) -> None:
        try:
            await asyncio.to_thread(self._store.sweep)
        except Exception:  # as below
            logger.exception("files that nobody needs cannot be removed")

    async def _open(self) -> list[BatchRecord]:
        try:
            return await asyncio.to_thread(self._store.open_batches)
        except Exception:  # a full disk, a locked database: it may pass
            logger.exception("the batches cannot be read")
            return []

    def _rested(self, batch: BatchRecord) -> bool:
        return time.monotonic() >= self._rests_until.get(batch.id, 0.0)

    async def _do(self, batch: BatchRecord) -> None:
        """One try at a batch; raises nothing."""
        try:
            await self._try(batch)
        except BatchError as error:
            logger.warning("%s: %s", batch.id, error)
            final = error.exit_code == USAGE_ERROR
            await self._failed(batch, Problem("batch_failed", str(error)), final=final)
        except Exception:
            logger.exception("%s failed", batch.id)
            problem = Problem("internal_error", "The batch failed; the runner's log tells why.")
            await self._failed(batch, problem, final=False)

    async def _failed(self, batch: BatchRecord, problem: Problem, *, final: bool) -> None:
        failures = self._failures[batch.id] = self._failures.get(batch.id, 0) + 1
        pause = min(self._pause_s * 2.0 ** (failures - 1), LONGEST_PAUSE_S)
        self._rests_until[batch.id] = time.monotonic() + pause
        if final or failures >= ATTEMPTS:
            try:
                await self._keep(batch)
                await asyncio.to_thread(self._store.fail, batch, problem)
            except Exception:  # then it is tried once more
                logger.exception("%s: its failure cannot be written down", batch.id)

    async def _keep(self, batch: BatchRecord) -> None:
        """Write what a batch that fails has finished; until it expires, room may come for it.

        Raises:
            BatchError: it cannot be, and may later.
        """
        try:
            counts = await asyncio.to_thread(write_finished, self._spec(batch))
        except BatchError as error:
            if time.time() < batch.expires_at:
                raise
            logger.error("%s: what was answered is lost: %s", batch.id, error)
            return
        if counts is not None:
            await asyncio.to_thread(
                self._store.progress, batch, counts.total, counts.done, counts.failed
            )

    async def _try(self, batch: BatchRecord) -> None:
        store = self._store
        logger.info("%s of '%s' is %s", batch.id, batch.tenant, batch.status)
        if batch.status == "finalizing":
            await asyncio.to_thread(store.finish, batch, "completed")
            return
        expired = time.time() >= batch.expires_at
        if batch.status == "validating":
            if expired:
                await asyncio.to_thread(store.finish, batch, "expired")
                return
            if not await asyncio.to_thread(store.begin, batch):
                return
        spec = self._spec(batch)
        watch = _Watch(store, batch, self._look_s)
        watching = asyncio.create_task(watch.run())
        try:
            if await asyncio.to_thread(_is_done, spec):
                counts = watch.counts
            else:
                counts = await self._work(batch.tenant, spec, watch.listen, watch.over)
        finally:
            watch.end()  # not cancelled: what it writes is not to come after what is written below
            await watching
        await asyncio.to_thread(store.progress, batch, counts.total, counts.done, counts.failed)
        if watch.expired:
            await asyncio.to_thread(store.finish, batch, "expired")
        elif watch.over.is_set() or not await asyncio.to_thread(store.finalize, batch):
            await asyncio.to_thread(store.finish, batch, "cancelled")
        else:
            await asyncio.to_thread(store.finish, batch, "completed")
        self._failures.pop(batch.id, None)
        logger.info("%s is over: %d of %d answered", batch.id, counts.done, counts.total)

    def _spec(self, batch: BatchRecord) -> JobSpec:
        store = self._store
        return JobSpec(
            inputs=(str(store.content_of(batch.input_file_id)),),
            output=str(store.output_of(batch)),
            errors=str(store.errors_of(batch)),
            work=store.work_of(batch),
            endpoint=batch.endpoint,
        )


def _is_done(spec: JobSpec) -> bool:
    """Whether a runner that was killed had the job done: its outputs appear when it is, and then
    its ledger goes."""
    done = (Path(file).exists() for file in (spec.output, spec.errors))
    return all(done) and not spec.work.exists()


class _Watch:
    """Writes down where a batch stands, and sees whether it is to end before its time."""

    def __init__(self, store: Store, batch: BatchRecord, look_s: float) -> None:
        self.over = asyncio.Event()
        """Set when no more lines are to be asked."""
        self.expired = False
        """Whether that is since its time is over."""
        self._store = store
        self._batch = batch
        self._look_s = look_s
        self._ended = asyncio.Event()
        self.counts = Counts(batch.total, batch.done, batch.failed)
        """The last that were told."""
        if batch.status == "cancelling":
            self.over.set()

    def listen(self, counts: Counts) -> None:
        """Where it stands now."""
        self.counts = counts

    def end(self) -> None:
        """Have `run` come to its end."""
        self._ended.set()

    async def run(self) -> None:
        """Until `end`."""
        while not self._ended.is_set():
            counts, batch = self.counts, self._batch
            try:
                status = await asyncio.to_thread(
                    self._store.progress, batch, counts.total, counts.done, counts.failed
                )
            except Exception:  # it may pass, and the job goes on
                logger.exception("%s: where it stands cannot be written down", batch.id)
            else:
                if status == "cancelling":
                    self.over.set()
                elif time.time() >= batch.expires_at and not self.over.is_set():
                    self.expired = True
                    self.over.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await self._ended.wait()


class Gateway:
    """Does jobs by asking the gateway on behalf of the tenants."""

    def __init__(self, config: RunConfig, run_dir: Path, url: str) -> None:
        """Describe it; nothing is asked yet."""
        self._config = config.gateway
        self._run_dir = run_dir
        self._url = url

    async def __call__(
        self,
        tenant: str,
        spec: JobSpec,
        listener: Callable[[Counts], None],
        cancelled: asyncio.Event,
    ) -> Counts:
        """Do a job."""
        workers = len(read_table(self._run_dir / TABLE_FILE).workers)
        concurrency = self._config.batch_concurrency * self._config.processes * max(1, workers)
        async with EndpointBackend(
            self._url, concurrency=concurrency, headers=self._headers(tenant)
        ) as backend:
            return await run_job(spec, backend, listener, cancelled)

    def _headers(self, tenant: str) -> Mapping[str, str]:
        key = (self._run_dir / ENGINE_KEY_FILE).read_text(encoding="utf-8").strip()
        return {"authorization": f"Bearer {key}", ON_BEHALF.decode(): tenant}


def main() -> int:
    """Run the batches; the exit code is 0 after an orderly end."""
    arguments = _arguments()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    config = RunConfig.model_validate_json(arguments.config.read_bytes())
    asyncio.run(_serve(config, Gateway(config, arguments.run_dir, arguments.url)))
    return 0


async def _serve(config: RunConfig, work: Work) -> None:
    """Run the batches until standard input closes or a signal comes."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    threading.Thread(target=_await_end_of_input, args=(loop, over.set), daemon=True).start()
    store = Store(config.bundle.scratch / DIRECTORY)
    running = asyncio.create_task(_run_alone(store, work, config.gateway.batches_at_once))
    waiting = asyncio.create_task(over.wait())
    try:
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        for task in (running, waiting):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        store.close()


async def _run_alone(store: Store, work: Work, at_once: int) -> None:
    """Run the batches, once no other runner does: two endpoints may have one scratch directory."""
    store.directory.mkdir(parents=True, exist_ok=True)
    with (store.directory / ".runner.lock").open("w") as lock:
        while not _locked(lock.fileno()):  # noqa: ASYNC110 - another process has it
            await asyncio.sleep(LOOK_S)
        logger.info("running the batches in %s", store.directory)
        await Runner(store, work, at_once=at_once).run()


def _locked(descriptor: int) -> bool:
    """Whether the lock is this process' from now on, until it ends."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.batch.runner", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a RunConfig as JSON")
    parser.add_argument("--run-dir", type=Path, required=True, help="where the engines' key lies")
    parser.add_argument("--url", required=True, help="root of the gateway's API")
    return parser.parse_args()


def _await_end_of_input(loop: asyncio.AbstractEventLoop, end: Callable[[], object]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    logger.info("standard input closed: the runner ends")
    loop.call_soon_threadsafe(end)


if __name__ == "__main__":
    sys.exit(main())
