"""One engine, kept alive: started, verified, watched, started again.

    starting ──► ready ──► down ──► ready …
        └──────────┴────────┴──► failed (after `max_failed_starts` in a row; still tried, slowly)

Ready means that a token has been generated with the base and with every expert listed, and that
each expert answered as its fingerprint says.

Knows nothing of Ray, of placement, or of how the engine is called.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from configs.schema import ServingConfig
from expert_trainer.errors import DamagedBundleError, StorageError
from server.engine import Adapter, EngineClient, fingerprint_distance
from server.errors import EngineCallError, ServerError
from server.process import CommandFor, EngineProcess
from server.table import WorkerEntry, WorkerState

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
STARTUP_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Identity:
    """What about a worker never changes."""

    id: str
    node: str
    """Address of the node, on which the engine listens."""
    devices: str


class _EngineLostError(Exception):
    """The engine did not come up, or hung; the text says which."""


class Supervisor:
    """Keeps one engine alive from `start` to `stop`."""

    def __init__(
        self,
        *,
        identity: Identity,
        command_for: CommandFor,
        base_name: str,
        adapters: Sequence[Adapter],
        serving: ServingConfig,
        log_path: Path,
    ) -> None:
        """Describe the engine; nothing is started yet.

        Args:
            identity: the worker's.
            command_for: makes the command of each start; the port is a new one every time.
            base_name: name under which the engine serves the base.
            adapters: what it is to load and verify.
            serving: time limits and the fingerprint's tolerance.
            log_path: the engine's output is appended here.
        """
        self._identity = identity
        self._command_for = command_for
        self._base_name = base_name
        self._adapters = tuple(adapters)
        self._serving = serving
        self._log_path = log_path
        self._task: asyncio.Task[None] | None = None
        self._state: WorkerState = "starting"
        self._detail = "the engine is starting"
        self._process: EngineProcess | None = None
        self._engine = ""
        self._experts: list[str] = []
        self._damaged: dict[str, str] = {}
        self._restarts = 0
        self._failed_starts = 0
        self.max_model_len: int | None = None
        """Context length in tokens, as the engine told it."""

    @property
    def entry(self) -> WorkerEntry:
        """The worker as it is now; a fault of the supervisor's own is raised here."""
        if self._task and self._task.done() and not self._task.cancelled():
            self._task.result()
        ready = self._state == "ready"
        return WorkerEntry(
            id=self._identity.id,
            state=self._state,
            url=self._process.url if self._process else None,
            node=self._identity.node,
            devices=self._identity.devices,
            engine=self._engine,
            pid=self._process.pid if self._process else None,
            experts=list(self._experts) if ready else [],
            restarts=self._restarts,
            detail=self._detail,
        )

    def start(self) -> None:
        """Start the engine and keep it alive, in a task of the running loop."""
        self._task = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        """End the engine and everything it started."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        if self._process:  # the task was cancelled while it was ending the engine
            await self._process.stop()

    async def _keep_alive(self) -> None:
        while True:
            try:
                await self._run_once()
            except (OSError, ServerError, StorageError) as error:
                self._note_loss(f"the engine cannot be started: {error}")
            except Exception as error:
                # Whatever else goes wrong costs one life of the engine, not the supervisor.
                log.exception("%s: an unforeseen error", self._identity.id)
                self._note_loss(
                    f"the supervisor failed ({type(error).__name__}: {error}); the worker's log "
                    "has the traceback"
                )
            await asyncio.sleep(_backoff(self._failed_starts))

    async def _run_once(self) -> None:
        """One life of the engine, from its start to the end of its last process."""
        await self._fetch_adapters()
        process = await EngineProcess.start(
            self._command_for, host=self._identity.node, log=self._log_path
        )
        self._process = process
        try:
            await self._live_and_die(process)
        finally:
            await process.stop()
            self._process = None

    async def _fetch_adapters(self) -> None:
        """Have every expert's files on this machine; copies that are there and intact stand.

        Raises:
            StorageError: the bundle cannot be reached, or the copies not be written.
        """
        self._damaged = dict(
            fault for fault in await asyncio.gather(*map(_fetch, self._adapters)) if fault
        )

    async def _live_and_die(self, process: EngineProcess) -> None:
        """Bring the engine up and watch it; note its loss as soon as that is known."""
        async with aiohttp.ClientSession() as session:
            life = asyncio.create_task(self._live(EngineClient(session, process.url)))
            ended = asyncio.create_task(process.ended())
            try:
                await asyncio.wait({life, ended}, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    self._note_loss(self._epitaph(process, ended.result()))
                else:
                    await life
            except _EngineLostError as lost:
                self._note_loss(str(lost))
            finally:
                for task in (life, ended):
                    task.cancel()
                await asyncio.gather(life, ended, return_exceptions=True)

    def _note_loss(self, reason: str) -> None:
        log.warning("%s: %s", self._identity.id, reason)
        if self._state == "ready":
            self._failed_starts = 0
            self._restarts += 1
            self._state = "down"
        else:
            self._failed_starts += 1
        if self._failed_starts >= self._serving.max_failed_starts:
            self._state = "failed"
            self._detail = f"{self._failed_starts} failed starts in a row; the last: {reason}"
        else:
            self._detail = f"{reason}; it is being started again"

    async def _live(self, client: EngineClient) -> None:
        """Bring the engine up and watch it.

        Raises:
            _EngineLostError: it did not come up in time, or hung later.
        """
        await self._await_health(client)
        try:
            self._engine = await client.version()
            self.max_model_len = await client.max_model_len()
            await client.generate(self._base_name)
        except EngineCallError as error:
            raise _EngineLostError(f"the engine does not answer for the base: {error}") from None
        refusals = [reason for a in self._adapters if (reason := await self._admit(client, a))]
        refused = {name for name, _ in refusals}
        self._experts = [a.served_name for a in self._adapters if a.served_name not in refused]
        self._detail = "; ".join(f"{name} refused: {reason}" for name, reason in refusals)
        self._state = "ready"
        await self._watch(client)

    async def _await_health(self, client: EngineClient) -> None:
        limit = self._serving.startup_timeout_s
        try:
            async with asyncio.timeout(limit):
                while True:
                    if await client.healthy(timeout_s=limit):
                        return
                    await asyncio.sleep(STARTUP_POLL_S)
        except TimeoutError:
            raise _EngineLostError(
                f"the engine did not answer within {limit:g} s; raise serving.startup_timeout_s "
                f"or see {self._log_path}"
            ) from None

    async def _admit(self, client: EngineClient, adapter: Adapter) -> tuple[str, str] | None:
        """Load an expert and verify it; its name and the reason if it is refused."""
        name, fingerprint = adapter.served_name, adapter.fingerprint
        if name in self._damaged:
            return name, self._damaged[name]
        try:
            await client.load(adapter)
            if not self._serving.verify_fingerprints:
                await client.generate(name)
                return None
            measured = await client.probe(name, fingerprint.token_ids)
        except EngineCallError as error:
            return name, str(error)
        distance = fingerprint_distance(measured, fingerprint.logprobs)
        if distance <= self._serving.fingerprint_tolerance:
            return None
        await self._unload(client, name)
        return name, (
            f"it does not answer as it did when it was trained (log-probabilities differ by "
            f"{distance:.3g} nats, {self._serving.fingerprint_tolerance:g} pass); "
            "publish it again with `introvert train`"
        )

    async def _unload(self, client: EngineClient, name: str) -> None:
        try:
            await client.unload(name)
        except EngineCallError as error:
            log.warning("%s: %s cannot be unloaded: %s", self._identity.id, name, error)

    async def _watch(self, client: EngineClient) -> None:
        """Look at a ready engine until it has been silent for too long.

        Raises:
            _EngineLostError: it hung.
        """
        limit = self._serving.hang_timeout_s
        last_answer = time.monotonic()
        while True:
            await asyncio.sleep(self._serving.health_interval_s)
            if await client.healthy(timeout_s=limit):
                last_answer = time.monotonic()
            elif time.monotonic() - last_answer >= limit:
                raise _EngineLostError(f"the engine hung: no health check passed for {limit:g} s")

    def _epitaph(self, process: EngineProcess, how: str) -> str:
        if self._state == "ready":
            return f"the engine ended ({how})"
        return (
            f"the engine ended before it was ready ({how}); the end of {self._log_path}:\n"
            f"{process.last_words()}"
        )


async def _fetch(adapter: Adapter) -> tuple[str, str] | None:
    """Copy an expert's files, off the event loop; its name and the fault if they are damaged."""
    if adapter.source is None:
        return None
    try:
        await asyncio.to_thread(adapter.source.fetch, Path(adapter.path))
    except DamagedBundleError as error:
        return adapter.served_name, str(error)
    return None


def _backoff(failed_starts: int) -> float:
    """Seconds before the next start: none after a loss, then doubling with each failed start."""
    if failed_starts == 0:
        return 0.0
    return min(FIRST_BACKOFF_S * 2.0 ** (failed_starts - 1), LONGEST_BACKOFF_S)
