"""One engine, kept alive: started, verified, watched, started again.

    starting ──► ready ──► down ──► ready …
        └──────────┴────────┴──► failed (after `max_failed_starts` in a row; still tried, slowly)

Ready means that a token has been generated with the base and with every expert listed, and that
each expert answered as its fingerprint says. Told to serve other experts, an engine goes on: those
are loaded beside the ones that it has (see `server.adapters`).

Knows nothing of Ray, of placement, or of how the engine is called.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from configs.schema import ServingConfig
from expert_trainer.errors import StorageError
from server.adapter_files import modules_of
from server.adapters import Adapters
from server.engine import Adapter, EngineCommand, Room, room_for
from server.engine_client import EngineClient
from server.errors import EngineCallError, ServerError
from server.process import EngineProcess
from server.table import WorkerEntry, WorkerState

log = logging.getLogger(__name__)

CommandFor = Callable[[Room | None, str, int], EngineCommand]
"""Room for adapters, host and port to the command of an engine that listens there."""

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
STARTUP_POLL_S = 0.25
IDLE_SHARE = 0.1
"""Share of a core below which an engine does nothing but answer questions about itself."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What about a worker never changes."""

    id: str
    node: str
    """Address of the node, on which the engine listens."""
    devices: str


class _EngineLostError(Exception):
    """The engine did not come up, ended or hung; the text says which."""


class _EngineOutgrownError(Exception):
    """The engine was started without room for adapters, and is to have some now."""


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
        api_key: str | None = None,
    ) -> None:
        """Describe the engine; nothing is started yet.

        Args:
            identity: the worker's.
            command_for: makes the command of each start; the port is a new one every time.
            base_name: name under which the engine serves the base.
            adapters: what it is to load and verify.
            serving: time limits and the fingerprint's tolerance.
            log_path: the engine's output is appended here.
            api_key: what the engine asks of its callers.
        """
        self._identity = identity
        self._command_for = command_for
        self._base_name = base_name
        self._adapters = Adapters(adapters, serving)
        self._serving = serving
        self._log_path = log_path
        self._api_key = api_key
        self._task: asyncio.Task[None] | None = None
        self._state: WorkerState = "starting"
        self._detail = "the engine is starting"
        self._process: EngineProcess | None = None
        self._engine = ""
        self._slots: int | None = None
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
            experts=self._adapters.verified if ready else [],
            restarts=self._restarts,
            detail=self._adapters.detail if ready else self._detail,
            refused=self._adapters.refused,
            slots=self._slots,
        )

    def serve(self, adapters: Sequence[Adapter]) -> None:
        """Serve these from now on: what is new is loaded and verified, what is gone unloaded."""
        self._adapters.want(adapters)

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
        await self._adapters.fetch()
        wanted = self._adapters.wanted
        room = room_for(wanted, self._serving, await modules_of(wanted))
        self._adapters.begin(room)
        process = await EngineProcess.start(
            partial(self._command_for, room), host=self._identity.node, log=self._log_path
        )
        self._slots = room.slots if room else 0
        self._process = process
        try:
            await self._live_and_die(process)
        finally:
            await process.stop()
            self._process = None

    async def _live_and_die(self, process: EngineProcess) -> None:
        """Bring the engine up and watch it; note its loss as soon as that is known."""
        async with aiohttp.ClientSession() as session:
            try:
                await _first_of(self._mourn(process), self._live(session, process))
            except _EngineLostError as lost:
                self._note_loss(str(lost))
            except _EngineOutgrownError as outgrown:
                log.warning("%s: %s", self._identity.id, outgrown)
                self._state, self._detail = "starting", str(outgrown)

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

    async def _mourn(self, process: EngineProcess) -> None:
        how = await process.ended()
        raise _EngineLostError(self._epitaph(process, how))

    async def _live(self, session: aiohttp.ClientSession, process: EngineProcess) -> None:
        """Bring the engine up and watch it.

        Raises:
            _EngineLostError: it did not come up in time, or hung later.
            _EngineOutgrownError: it has to be started anew.
        """
        client = EngineClient(session, process.url, self._api_key)
        await self._await_health(client)
        try:
            self._engine = await client.version()
            self.max_model_len = await client.max_model_len()
            await client.generate(self._base_name)
        except EngineCallError as error:
            raise _EngineLostError(f"the engine does not answer for the base: {error}") from None
        await _first_of(
            self._watch(client), self._watch_generation(client, process), self._follow(client)
        )

    async def _follow(self, client: EngineClient) -> None:
        """Have the engine hold what is wanted; ready once all of that has been tried."""
        while self._adapters.fits:
            await self._adapters.settle(client)
            self._state = "ready"
            await self._adapters.changed()
        raise _EngineOutgrownError(
            "the engine was started without room for experts; it is started again with it"
        )

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

    async def _watch(self, client: EngineClient) -> None:
        """Look at an engine until it has been silent for too long.

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

    async def _watch_generation(self, client: EngineClient, process: EngineProcess) -> None:
        """See that the base generates, for health checks do not reach what computes.

        A token that is late proves nothing by itself: many requests may be before it, and on a CPU
        one step over long prompts takes minutes. Only an engine that computes no token meanwhile
        and that its processors have forgotten as well is given up.

        Raises:
            _EngineLostError: it hung.
        """
        limit = self._serving.hang_timeout_s
        while True:
            await asyncio.sleep(limit)
            with suppress(EngineCallError):
                tokens, used = await client.tokens_computed(), process.cpu_seconds()
                if await self._generates(client, limit):
                    continue
                stands_still = await client.tokens_computed() == tokens
                if stands_still and process.cpu_seconds() - used < IDLE_SHARE * limit:
                    raise _EngineLostError(
                        f"the engine hung: it is well by its own word, but for {limit:g} s it "
                        "computed nothing, with a request waiting"
                    )

    async def _generates(self, client: EngineClient, limit_s: float) -> bool:
        """Whether the base generates a token in time, or the engine says at least why not."""
        try:
            await client.generate(self._base_name, timeout_s=limit_s)
        except EngineCallError as error:
            return error.status is not None
        return True

    def _epitaph(self, process: EngineProcess, how: str) -> str:
        if self._state == "ready":
            return f"the engine ended ({how})"
        return (
            f"the engine ended before it was ready ({how}); the end of {self._log_path}:\n"
            f"{process.last_words()}"
        )


async def _first_of(*courses: Coroutine[Any, Any, None]) -> None:
    """Run these until one ends, and end the others; raise what that one raised."""
    tasks = [asyncio.ensure_future(course) for course in courses]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome


def _backoff(failed_starts: int) -> float:
    """Seconds before the next start: none after a loss, then doubling with each failed start."""
    if failed_starts == 0:
        return 0.0
    return min(FIRST_BACKOFF_S * 2.0 ** (failed_starts - 1), LONGEST_BACKOFF_S)
