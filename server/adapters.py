"""The adapters of one engine: which it is to have, which it has, which were refused and why.

    wanted ──► files checked ──► loaded ──► verified ──► unloaded, when wanted no more
                    └───────────────┴──────────┴──► refused, until it is dropped and wanted anew

What is wanted may change at any time, also while one is being loaded: the latest wins. The engine
may be lost at any time: the next one gets all that is wanted then.

Knows nothing of how an engine is started or watched.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from configs.schema import ServingConfig
from expert_trainer.errors import DamagedBundleError, StorageError
from server.adapter_files import changed_modules, fault_of, fetch
from server.engine import Adapter, Room, fingerprint_distance
from server.errors import EngineCallError

log = logging.getLogger(__name__)

TRIES = 3
"""Times that an expert is tried while the engine does not answer for reasons of its own."""
RETRY_PAUSE_S = 1.0
RETRY_UNLOAD_S = 10.0
DEADLY = 2
"""Engines that an expert may take along while it is loaded; then it is refused."""


class Loading(Protocol):
    """An engine, as far as adapters need it; all but `healthy` raise `EngineCallError`."""

    async def healthy(self, timeout_s: float) -> bool:
        """Whether it says that it is well."""
        ...

    async def load(self, adapter: Adapter) -> None:
        """Load an adapter under its served name."""
        ...

    async def unload(self, served_name: str) -> None:
        """Take an adapter out."""
        ...

    async def generate(self, model: str) -> None:
        """Have `model` generate one token."""
        ...

    async def probe(self, model: str, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of a probe, and one token generated."""
        ...


class Adapters:
    """What an engine holds, brought step by step to what it is to hold."""

    def __init__(self, wanted: Sequence[Adapter], serving: ServingConfig) -> None:
        """Want `wanted`; no engine is there yet."""
        self._serving = serving
        self._wanted = {adapter.served_name: adapter for adapter in wanted}
        self._changed = asyncio.Event()
        self._room: Room | None = None
        self._held: set[str] = set()
        self._verified: dict[str, None] = {}
        self._refused: dict[str, str] = {}
        self._damaged: dict[str, str] = {}
        self._stuck: dict[str, str] = {}
        self._in_hand: str | None = None
        self._deaths: Counter[str] = Counter()

    @property
    def wanted(self) -> tuple[Adapter, ...]:
        """What the engine is to hold."""
        return tuple(self._wanted.values())

    @property
    def verified(self) -> list[str]:
        """Served names that can be asked for: those wanted, in order, then those on their way
        out."""
        wanted = [name for name in self._wanted if name in self._verified]
        return wanted + [name for name in self._verified if name not in self._wanted]

    @property
    def refused(self) -> dict[str, str]:
        """Those wanted that will not be served, with the reason."""
        return {name: self._refused[name] for name in self._wanted if name in self._refused}

    @property
    def detail(self) -> str:
        """What is not as it should be; empty when all is well."""
        faults = [f"{name} refused: {reason}" for name, reason in self.refused.items()]
        faults += [f"{name} cannot be unloaded: {why}" for name, why in self._stuck.items()]
        return "; ".join(faults)

    def want(self, adapters: Sequence[Adapter]) -> None:
        """Want these, in place of those before.

        What was refused and is wanted still stays refused; what is dropped gets a new chance when
        it is wanted anew.
        """
        self._wanted = {adapter.served_name: adapter for adapter in adapters}
        for record in (self._refused, self._deaths):
            for name in record.keys() - self._wanted.keys():
                del record[name]
        self._changed.set()

    async def changed(self) -> None:
        """Wait until `settle` has something to do."""
        with suppress(TimeoutError):
            async with asyncio.timeout(RETRY_UNLOAD_S if self._stuck else None):
                await self._changed.wait()

    def begin(self, room: Room | None) -> None:
        """A new engine, which holds nothing yet, takes the place of the one before."""
        if self._in_hand is not None:
            self._deaths[self._in_hand] += 1
        self._in_hand = None
        self._room = room
        self._held.clear()
        self._verified.clear()
        self._stuck.clear()
        self._refused = {n: reason for n, reason in self._damaged.items() if n in self._wanted}
        self._refused |= {
            name: f"{count} engines ended while it was being loaded; the engine's log tells why"
            for name, count in self._deaths.items()
            if count >= DEADLY and name in self._wanted
        }

    async def fetch(self) -> None:
        """Have the files of all that is wanted on this machine, before an engine begins.

        What is damaged is refused by the one that begins next.

        Raises:
            StorageError: the bundle cannot be reached, or the copies not be written.
        """
        self._damaged = {}
        for fault in await asyncio.gather(*map(_fetched, self.wanted)):
            self._damaged |= fault

    async def settle(self, engine: Loading) -> None:
        """Load and verify what is wanted and new, then unload what is wanted no more.

        One after the other: each load and probe holds up what the engine is answering. Returns
        when the engine holds all that is wanted now, but for what was refused.
        """
        self._changed.clear()
        while (adapter := self._next()) is not None:
            await self._admit(engine, adapter)
        for name in sorted(self._held):
            if name not in self._wanted or name in self._refused:
                await self._drop(engine, name)

    @property
    def fits(self) -> bool:
        """Whether the engine was started with room for adapters, or needs none."""
        return self._room is not None or not self._wanted

    def _next(self) -> Adapter | None:
        """The next one to load: those that no engine died of come first."""
        pending = [
            adapter
            for name, adapter in self._wanted.items()
            if name not in self._verified and name not in self._refused
        ]
        return min(pending, key=lambda adapter: self._deaths[adapter.served_name], default=None)

    async def _admit(self, engine: Loading, adapter: Adapter) -> None:
        """Load one expert and verify it, or refuse it."""
        name = adapter.served_name
        reason = await self._unfit(adapter)
        if reason is None:
            self._in_hand = name
            reason = await self._try(engine, adapter)
            self._in_hand = None
        if reason is None:
            self._verified[name] = None
            self._deaths.pop(name, None)
            return
        if name in self._held:
            await self._drop(engine, name)
        if name in self._wanted:
            log.warning("%s refused: %s", name, reason)
            self._refused[name] = reason

    async def _unfit(self, adapter: Adapter) -> str | None:
        """Why the engine must not see it."""
        if self._room is None:
            return "the engine was started without room for experts"
        if adapter.rank > self._room.rank:
            return (
                f"its rank is {adapter.rank}, and the engine was started for {self._room.rank} at "
                f"the most; start `introvert serve` with serving.max_rank={adapter.rank} or more, "
                "or train with a lower experts.rank"
            )
        try:
            await fetch(adapter)
            return await fault_of(adapter) or await self._unforeseen(adapter, self._room)
        except (DamagedBundleError, StorageError) as error:
            return str(error)

    async def _unforeseen(self, adapter: Adapter, room: Room) -> str | None:
        more = await changed_modules(adapter) - room.modules if room.modules else set()
        if not more:
            return None
        return (
            f"it changes layers ({', '.join(sorted(more))}) that no expert changed with which the "
            "engine was started; start `introvert serve` again"
        )

    async def _try(self, engine: Loading, adapter: Adapter) -> str | None:
        """Why it cannot be served, once the engine itself is well."""
        for attempt in range(1, TRIES + 1):
            try:
                return await self._load_and_verify(engine, adapter)
            except EngineCallError as error:
                reason = str(error)
                answered = error.status is not None
            if answered and await engine.healthy(self._serving.hang_timeout_s):
                return reason  # it is the expert's fault
            if attempt < TRIES:
                # The engine is busy or ending. If it ends, whoever watches it ends this too.
                await asyncio.sleep(RETRY_PAUSE_S)
        return reason

    async def _load_and_verify(self, engine: Loading, adapter: Adapter) -> str | None:
        name, fingerprint = adapter.served_name, adapter.fingerprint
        if name in self._held:  # what is left there may be anything
            await self._unload(engine, name)
        self._held.add(name)
        await engine.load(adapter)
        if not self._serving.verify_fingerprints:
            await engine.generate(name)
            return None
        measured = await engine.probe(name, fingerprint.token_ids)
        distance = fingerprint_distance(measured, fingerprint.logprobs)
        if distance <= self._serving.fingerprint_tolerance:
            return None
        return (
            f"it does not answer as it did when it was trained (log-probabilities differ by "
            f"{distance:.3g} nats, {self._serving.fingerprint_tolerance:g} pass); "
            "publish it again with `introvert train`"
        )

    async def _drop(self, engine: Loading, name: str) -> None:
        """Unload one; it is listed no more whatever comes of that."""
        self._verified.pop(name, None)
        try:
            await self._unload(engine, name)
        except EngineCallError as error:
            log.warning("%s cannot be unloaded: %s", name, error)
            self._stuck[name] = str(error)

    async def _unload(self, engine: Loading, name: str) -> None:
        await engine.unload(name)
        self._stuck.pop(name, None)
        self._held.discard(name)


async def _fetched(adapter: Adapter) -> dict[str, str]:
    try:
        await fetch(adapter)
    except DamagedBundleError as error:
        return {adapter.served_name: str(error)}
    return {}
