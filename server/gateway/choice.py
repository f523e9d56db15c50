"""Which bundle and which worker a request gets.

The bundle is the one that is served, or the canary for its share of the conversations. The worker
is the one that a conversation usually goes to, where its prefix is cached, unless that is much
busier than another. This module knows nothing of HTTP and of how a text is routed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable
from zlib import crc32

from configs.schema import GatewayConfig
from server.engine_slots import AHEAD
from server.gateway.admission import Lane
from server.gateway.breaker import Breakers
from server.gateway.counts import Counts
from server.gateway.errors import ModelNotFoundError, NoEngineError
from server.gateway.residency import Residency
from server.gateway.views import Home, Target, View, Views, salt_of, views_of
from server.table import ROUTED_MODEL, RoutingTable, WorkerEntry

BEGINNING_BYTES = 1024
"""Of a prompt, what tells conversations apart."""

_KEYS = 2**32
_MIX = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1


def conversation_key(prompt: bytes | memoryview) -> int:
    """A number below 2**32 that the turns of one conversation share.

    Args:
        prompt: the beginning of the field that holds the prompt, or all of it, as JSON. Of a chat
            what comes before the first answer counts, since every turn repeats that.
    """
    beginning = bytes(prompt[:BEGINNING_BYTES])
    answer = beginning.find(b'"assistant"')
    if answer >= 0 or len(beginning) < BEGINNING_BYTES:
        end = beginning.rfind(b"}", 0, answer if answer >= 0 else None)
        if end >= 0:
            beginning = beginning[:end]
    return crc32(beginning)


def _same(before: WorkerEntry, after: WorkerEntry | None) -> bool:
    """Whether a worker's engine is the same process."""
    return after is not None and (after.url, after.pid) == (before.url, before.pid)


def _lost(before: WorkerEntry, after: WorkerEntry) -> bool:
    """Whether a worker holds less than it did."""
    return not set(before.experts).issubset(after.experts)


class Chooser:
    """The current table as the gateway uses it."""

    def __init__(
        self,
        config: GatewayConfig,
        counts: Counts,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A chooser that has seen no table.

        Args:
            config: limits of workers, queues and breakers.
            counts: requests in flight by worker, over all gateway processes.
            seed: of the choice among replicas.
            clock: the moment, in seconds.
        """
        self.table: RoutingTable | None = None
        self.breakers = Breakers(config.breaker_failures, config.breaker_pause_s, clock)
        self.in_flight_bundles: defaultdict[str, int] = defaultdict(int)
        """Requests that have taken a bundle's view and are not over, by its version."""
        self.demand: defaultdict[str, float] = defaultdict(float)
        """Engine seconds asked for since the start, by the id of the expert that was wanted."""
        self._config = config
        self._counts = counts
        self._clock = clock
        self._random = random.Random(seed)
        self._views: Views | None = None
        self._lanes: dict[str, Lane] = {}
        self._engines: dict[str, WorkerEntry] = {}
        self._residencies: dict[str, Residency] = {}
        self._changed = asyncio.Event()
        self.homeless = 0
        """Requests that wait for a home to come back."""

    def update(self, table: RoutingTable) -> None:
        """Serve by this table from now on; requests that run keep the home they have."""
        now = {worker.id: worker for worker in table.workers}
        replaced = {
            worker for worker, before in self._engines.items() if not _same(before, now.get(worker))
        }
        for worker in replaced:  # before homes are made, which would go on with these
            self.breakers.forget(worker)
            self._residencies.pop(worker, None)
        self._views = views_of(table, self._home)
        self.table = table
        for worker, before in self._engines.items():
            after = now.get(worker)
            lane = self._lanes.get(worker)
            if lane is None or not lane.waiting:
                continue
            # Whoever waits for a worker that is lost, or for an expert that it holds no more, has
            # to look elsewhere.
            if (
                worker in replaced
                or after is None
                or after.state != "ready"
                or _lost(before, after)
            ):
                lane.dissolve()
        self._engines = now
        for gone in self._lanes.keys() - now.keys():
            if not self._lanes[gone].active:
                del self._lanes[gone]
        for bundle in [b for b, n in self.in_flight_bundles.items() if not n]:
            del self.in_flight_bundles[bundle]
        self._wake()

    @property
    def in_flight(self) -> dict[str, int]:
        """This process' requests in flight, by worker; of the table's workers zeros, too."""
        workers = self.table.workers if self.table else ()
        return {**dict.fromkeys((worker.id for worker in workers), 0), **self._counts.own()}

    @property
    def queued(self) -> dict[str, int]:
        """This process' requests that wait, by worker."""
        return {worker: lane.waiting for worker, lane in self._lanes.items()}

    @property
    def resident(self) -> dict[str, int]:
        """Experts thought to be in the slots, by worker, of those that hold more than slots."""
        return {worker: len(residency) for worker, residency in self._residencies.items()}

    @property
    def served(self) -> View:
        """The view of the bundle that is served.

        Raises:
            NoEngineError: no table has come yet.
        """
        return self._views_or_raise().served

    def view(self, key: int) -> View:
        """The view that a conversation gets: of the canary, if it falls into its share.

        Raises:
            NoEngineError: no table has come yet.
        """
        views = self._views_or_raise()
        if views.canary is not None and key < views.canary_share * _KEYS:
            return views.canary
        return views.served

    def named(self, model: str, view: View | None = None) -> tuple[View, Target]:
        """What a model name means: in the request's view, or else in whichever bundle knows it.

        Raises:
            NoEngineError: no table has come yet.
            ModelNotFoundError: no model has this name.
        """
        views = self._views_or_raise()
        for candidate in (view or views.served, views.served, views.canary):
            if candidate is not None and (target := candidate.by_name.get(model)) is not None:
                return candidate, target
        expert, at, _ = model.partition("@")
        current = views.served.by_expert.get(expert)
        if at and current is not None:
            raise ModelNotFoundError(
                f"'{model[:200]}' is not served: the current version is '{current.served_name}'. "
                f"Use that, or '{expert}' for whichever version is current.",
                param="model",
            )
        raise ModelNotFoundError(
            f"There is no model '{model[:200]}'. GET /v1/models lists them; '{ROUTED_MODEL}' "
            "routes by meaning.",
            param="model",
        )

    def routed(self, expert: str | None) -> Target:
        """Where a request that is routed to an expert of the served bundle goes.

        Raises:
            NoEngineError: no table has come yet.
        """
        return self.served.routed(expert)

    def choose(
        self, target: Target, key: int, tried: set[str], *, patient: bool = False
    ) -> Home | None:
        """The home for a request: the conversation's usual one (rendezvous hashing; Thaler and
        Ravishankar, 1998), unless a random other is less busy by more than `affinity_slack`.

        Two choices come close to the least loaded of all, without the herd that chasing the least
        loaded causes among several gateways (Mitzenmacher, IEEE TPDS 2001).

        Args:
            target: what is asked for; its homes are looked up anew, for it may be of a table
                before this one.
            key: of the conversation.
            tried: workers that gave this request no answer.
            patient: it has waited already, so it does not try workers that are left alone; one
                that has not tries the least bad of them.

        Returns none if there is no home now.
        """
        assert self._views is not None
        homes = self._views.homes.get(target.served_name, ())
        if tried or self.breakers.troubled:
            homes = self._usable(homes, tried, patient)
        if len(homes) < 2:
            return homes[0] if homes else None
        usual = max(homes, key=lambda home: ((key ^ home.salt) * _MIX) & _WORD)
        other = homes[int(self._random.random() * (len(homes) - 1))]
        if other is usual:
            other = homes[-1]
        return usual if self._load(usual) <= self._load(other) + self._slack else other

    def expected_wait(self, target: Target) -> float | None:
        """Seconds that a request would wait for the best of its homes; none without any."""
        assert self._views is not None
        homes = self._views.homes.get(target.served_name, ())
        if self.breakers.troubled:
            homes = tuple(home for home in homes if self.breakers.allows(home.worker))
        return min((home.lane.expected_wait(target.lane_name) for home in homes), default=None)

    def places(self, target: Target) -> bool:
        """Whether some worker is to hold a target's expert, by the table in use."""
        assert self._views is not None
        return bool(self._views.placed_on(target))

    def hopeless(self, target: Target) -> bool:
        """Whether waiting for a home is in vain: all that were to hold it refused it or failed."""
        assert self._views is not None
        if target.refused_by:
            return True
        homes = self._engines if target.expert is None else self._views.placed_on(target)
        engines = [self._engines[home] for home in homes if home in self._engines]
        return {engine.state for engine in engines} == {"failed"}

    async def change(self, timeout_s: float) -> None:
        """Wait until a table or a worker's recovery may have changed what can be chosen."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            pass

    def recovered(self, worker: str) -> None:
        """A worker that was left alone has answered: whoever waits for a home may look again."""
        if self.breakers.answered(worker):
            self._wake()

    def no_engine(self, target: Target | None = None) -> NoEngineError:
        """Why there is no home."""
        retry_after_s = self._config.retry_after_s
        if target is None:
            message = "No engine is ready yet. Try again shortly; GET /ready tells when."
        elif target.refused_by:
            message = (
                f"'{target.served_name}' was refused by its workers "
                f"({', '.join(target.refused_by)}); GET /admin/status tells why. Use 'introvert' "
                "or another model until it has been published again."
            )
        else:
            message = (
                f"No engine that holds '{target.served_name}' can be reached now. Try again in "
                f"{retry_after_s} s, or use another model; GET /ready tells what is missing."
            )
        return NoEngineError(message, retry_after_s=retry_after_s)

    @property
    def _slack(self) -> int:
        return self._config.affinity_slack

    def _load(self, home: Home) -> int:
        return self._counts.of(home.worker) + home.lane.waiting

    def _usable(self, homes: tuple[Home, ...], tried: set[str], patient: bool) -> tuple[Home, ...]:
        """Homes not tried yet and not left alone; if all are, and none was tried, the least bad."""
        left = [home for home in homes if home.worker not in tried]
        allowed = tuple(home for home in left if self.breakers.allows(home.worker))
        if allowed or tried or patient or not left:
            return allowed
        return (self.breakers.least_bad(left, lambda home: home.worker),)

    def _home(self, worker: WorkerEntry) -> Home:
        """A ready worker, with the lane that it has had before."""
        assert worker.url is not None
        config = self._config
        lane = self._lanes.get(worker.id)
        if lane is None:
            lane = self._lanes[worker.id] = Lane(
                limit=max(1, config.worker_concurrency // config.processes),
                max_queue=config.max_queue,
                group_wait_s=config.group_wait_s,
                clock=self._clock,
            )
        slots = worker.slots
        crowded = slots is not None and len(worker.experts) > slots
        # An engine counts the experts of all gateways, so each gets its part of the slots.
        lane.regroup(max(1, slots // config.processes) if slots is not None and crowded else None)
        room = lane.slots + AHEAD if lane.slots is not None else None
        residency = self._residencies.get(worker.id)
        if room is None:
            self._residencies.pop(worker.id, None)
            residency = None
        elif residency is None or residency.slots != room:
            residency = self._residencies[worker.id] = Residency(room)
        return Home(worker.id, worker.url.rstrip("/"), lane, residency, salt_of(worker.id))

    def _views_or_raise(self) -> Views:
        if self._views is None:
            raise self.no_engine()
        return self._views

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
