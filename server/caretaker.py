"""Workers in the controller's care: watched, told what to hold, and written into the table.

Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from server.engine import Adapter
from server.errors import WorkerLostError
from server.homes import Homes, Hosts, shelters
from server.orders import Deployment, Orders, Post, Rules
from server.placement import ExpertDemand, Placement, WorkerCapacity, plan_placement, replan
from server.placement.measured import expected
from server.table import Canary, ExpertHome, RoutingTable, WorkerEntry

POLL_S = 0.5
"""Seconds between two questions to a worker."""
ANSWER_TIMEOUT_S = 5.0
UNBORN = "Ray has not started its actor; see that the cluster has free cores, GPUs and memory"


class Caretaker:
    """Workers, what they are to hold, and the table that follows from how they are."""

    def __init__(
        self,
        orders: Orders,
        posts: Mapping[str, Post],
        rules: Rules,
        last: RoutingTable | None,
    ) -> None:
        self._orders, self._rules = orders, rules
        self._posts: dict[str, Post] = {}
        self._entries: dict[str, WorkerEntry] = {}
        self._ready_at: dict[str, float] = {}
        self._was_ready: set[str] = set()
        self._last_length = last.max_model_len if last else None
        self._lengths: dict[str, int] = {}
        self._rates: dict[str, float] = {}
        self._placements: dict[str, Placement] = {}
        if last is not None:
            homes = {expert.id: tuple(expert.workers) for expert in last.experts}
            self._placements[last.bundle] = Placement(homes)
        self._sheltered: tuple[frozenset[str], dict[str, dict[str, Hosts]]] | None = None
        self._moving = Homes(rules.settle_s, rules.drain_s)
        self._homes: dict[str, Hosts] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        known = {entry.id: entry for entry in last.workers} if last else {}
        self._staff(posts, known)
        self._place(anew=known.keys() != posts.keys())
        self._look()
        self._table = self._build(version=last.version if last else 1)
        if last is not None and self._table != last:
            self._table = self._build(version=last.version + 1)
        self._tick = asyncio.create_task(self._keep_looking())

    async def direct(self, orders: Orders, posts: Mapping[str, Post]) -> None:
        """Have these workers hold this from now on."""
        self._orders = orders
        self._place(anew=self._staff(posts, {}))
        self._look()
        await self._publish()

    def note_demand(self, rates: Mapping[str, float]) -> None:
        """Place experts anew by what they were asked for of late."""
        self._rates = expected(self._rates, rates, len(self._posts))
        self._place(anew=True)

    async def table(self, after_version: int, timeout_s: float) -> RoutingTable | None:
        """The table once it is newer than `after_version`; none if it is not in time."""
        for task in (self._tick, *self._tasks.values()):
            if task.done() and not task.cancelled():
                task.result()  # a fault of our own: let whoever asks see it
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._table.version > after_version)
        except TimeoutError:
            return None
        return self._table

    async def end(self) -> None:
        """Watch nobody any more."""
        tasks = [self._tick, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _staff(self, posts: Mapping[str, Post], known: Mapping[str, WorkerEntry]) -> bool:
        """Watch these workers and no others; whether they are others than before."""
        before = set(self._posts)
        for worker in [w for w, post in self._posts.items() if posts.get(w) != post]:
            self._tasks.pop(worker).cancel()
            self._was_ready.discard(worker)
            for record in (self._posts, self._entries, self._ready_at, self._lengths):
                record.pop(worker, None)
        for worker in [w for w in posts if w not in self._posts]:
            self._posts[worker] = post = posts[worker]
            old = known.get(worker) if post.adopted else None
            self._entries[worker] = old or _unheard(worker, post.node)
            self._ready_at[worker] = time.monotonic()
            self._tasks[worker] = asyncio.create_task(self._watch(worker, post))
        return before != set(self._posts)

    def _place(self, anew: bool) -> None:
        """Plan where the experts of new bundles live; or those of all, from where they live now."""
        beside = self._placements.get(self._orders.served.bundle) or next(
            iter(self._placements.values()), None
        )
        placements = {}
        for deployment in self._orders.deployments:
            before = self._placements.get(deployment.bundle)
            if before is None or anew:
                placements[deployment.bundle] = self._plan(deployment, before or beside)
            else:
                placements[deployment.bundle] = before
        self._placements = placements
        self._sheltered = None

    def _plan(self, deployment: Deployment, before: Placement | None) -> Placement:
        demands, capacities = self._demands(deployment), self._capacities()
        if before is None:
            return plan_placement(demands, capacities, self._rules.policy)
        return replan(before, demands, capacities, self._rules.policy)

    def _demands(self, deployment: Deployment) -> list[ExpertDemand]:
        """Loads by the rates measured, by the corpus' shares where there are none yet."""
        measured = sum(self._rates.get(expert.id, 0.0) for expert in deployment.experts)
        return [
            ExpertDemand(
                expert.id,
                # an expert that nobody asked for yet may be asked for next: it keeps a little mass
                (self._rates.get(expert.id, 0.0) + PRIOR * expert.mass) / (measured + PRIOR),
                expert.adapter.rank,
            )
            for expert in deployment.experts
        ]

    def _capacities(self) -> list[WorkerCapacity]:
        return [WorkerCapacity(worker, self._rules.slots) for worker in self._posts]

    def _look(self) -> bool:
        """Bring the homes up to date; whether any has changed."""
        now = time.monotonic()
        for worker, entry in self._entries.items():
            if entry.state == "ready":
                self._ready_at[worker] = now
                self._was_ready.add(worker)
        out = frozenset(worker for worker in self._posts if self._is_out(worker, now))
        if self._sheltered is None or self._sheltered[0] != out:
            self._sheltered = (out, self._shelters(out))
        held = {w: set(e.experts) for w, e in self._entries.items() if e.state == "ready"}
        homes = self._moving.look(self._wanted(), held, now)
        changed, self._homes = homes != self._homes, homes
        return changed

    def _is_out(self, worker: str, now: float) -> bool:
        """Whether its experts need a shelter; not while it starts for the first time."""
        starts = self._entries[worker].state == "starting" and worker not in self._was_ready
        return not starts and now - self._ready_at[worker] >= self._rules.move_after_s

    def _shelters(self, out: frozenset[str]) -> dict[str, dict[str, Hosts]]:
        return {
            deployment.bundle: shelters(
                self._placements[deployment.bundle],
                self._demands(deployment),
                self._capacities(),
                out,
                self._rules.policy,
            )
            for deployment in self._orders.deployments
        }

    def _wanted(self) -> dict[str, Hosts]:
        """Homes by served name; an expert of two bundles has those of the first that has it."""
        assert self._sheltered, "it has been looked at"
        wanted: dict[str, Hosts] = {}
        for deployment in self._orders.deployments:
            homes = self._sheltered[1][deployment.bundle]
            for expert in deployment.experts:
                wanted.setdefault(expert.name, homes[expert.id])
        return wanted

    async def _keep_looking(self) -> None:
        """For ever: shelter experts, let them go."""
        while True:
            await asyncio.sleep(POLL_S)
            if self._look():
                await self._publish()

    async def _watch(self, worker: str, post: Post) -> None:
        """Ask one worker how it is, for ever, and tell it what to hold when it holds other."""
        heard_of = False
        last_answer = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    status = await post.worker.status()
                if not heard_of:
                    self._moving.found(worker, status.entry.experts, time.monotonic())
                heard_of, last_answer = True, time.monotonic()
                await self._note(status.entry, status.max_model_len)
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await self._tell(worker, post, status.assigned)
            except WorkerLostError as error:
                await self._note_silence(worker, str(error))
            except TimeoutError:
                if time.monotonic() - last_answer > self._rules.silence_s:
                    await self._note_silence(worker, "it does not answer" if heard_of else UNBORN)
            await asyncio.sleep(POLL_S)

    async def _tell(self, worker: str, post: Post, assigned: Sequence[str] | None) -> None:
        """Tell a worker what to hold, if that is not what it was told last."""
        wanted = self._adapters_of(worker)
        if assigned is None or set(assigned) != {adapter.served_name for adapter in wanted}:
            await post.worker.serve(wanted)

    def _adapters_of(self, worker: str) -> list[Adapter]:
        adapters: dict[str, Adapter] = {}
        for deployment in self._orders.deployments:
            for expert in deployment.experts:
                if self._moving.holds(expert.name, worker):
                    adapters.setdefault(expert.name, expert.adapter)
        return list(adapters.values())

    async def _note(self, entry: WorkerEntry, max_model_len: int | None) -> None:
        if max_model_len is not None:
            self._lengths[entry.id] = max_model_len
        if self._entries[entry.id] != entry:
            self._entries[entry.id] = entry
            self._look()
            await self._publish()

    async def _note_silence(self, worker: str, reason: str) -> None:
        gone: dict[str, Any] = {
            "state": "down",
            "url": None,
            "pid": None,
            "experts": [],
            "refused": {},
            "detail": reason,
        }
        await self._note(self._entries[worker].model_copy(update=gone), None)

    async def _publish(self) -> None:
        if self._build(version=self._table.version) != self._table:
            async with self._changed:
                self._table = self._build(version=self._table.version + 1)
                self._changed.notify_all()

    def _build(self, version: int) -> RoutingTable:
        served, following = self._orders.served, self._orders.following
        canary = None
        if following is not None:
            canary = Canary(
                bundle=following.bundle,
                place=following.place,
                share=self._orders.share,
                experts=self._listed(following),
            )
        return RoutingTable(
            version=version,
            bundle=served.bundle,
            place=served.place,
            base_name=served.base_name,
            max_model_len=min(self._lengths.values(), default=self._last_length),
            workers=sorted(map(self._asked, self._entries.values()), key=_number),
            experts=self._listed(served),
            canary=canary,
        )

    def _asked(self, entry: WorkerEntry) -> WorkerEntry:
        """A worker's entry without the experts that it holds but is to be asked for no longer."""
        kept = [n for n in entry.experts if n not in self._homes or entry.id in self._homes[n]]
        return entry if kept == entry.experts else entry.model_copy(update={"experts": kept})

    def _listed(self, deployment: Deployment) -> list[ExpertHome]:
        return [
            ExpertHome(
                id=expert.id,
                version=expert.version,
                served_name=expert.name,
                cluster=expert.cluster,
                workers=list(self._homes[expert.name]),
            )
            for expert in deployment.experts
        ]


PRIOR = 0.05
"""Engine seconds per second: what the corpus' shares weigh against measured rates."""


def _number(entry: WorkerEntry) -> tuple[int, str]:
    """For sorting: `worker-2` before `worker-10`."""
    digits = entry.id.rpartition("-")[2]
    return (int(digits) if digits.isdigit() else 0, entry.id)


def _unheard(worker: str, node: str) -> WorkerEntry:
    return WorkerEntry(
        id=worker,
        state="starting",
        url=None,
        node=node,
        devices="",
        engine="",
        pid=None,
        experts=[],
        restarts=0,
        detail="Ray is starting its actor",
    )
