"""The controller: a Ray actor that places experts on workers and tells what became of it.

It keeps nothing that it could not be told again, by the driver what to serve and by the workers
how they are, so its death costs a pause in news and no more: it goes on from the last table.

Knows nothing of HTTP, of engines' processes, or of who reads the table.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from server.engine import Adapter
from server.errors import NotBegunError, WorkerLostError
from server.placement import ExpertDemand, Placement, WorkerCapacity, plan_placement
from server.table import ExpertHome, RoutingTable, WorkerEntry
from server.worker import WorkerStatus

POLL_S = 0.5
"""Seconds between two questions to a worker."""
ANSWER_TIMEOUT_S = 5.0
UNBORN = "Ray has not started its actor; see that the cluster has free cores, GPUs and memory"


@dataclass(frozen=True)
class ServedExpert:
    """An expert of the bundle that is to be served."""

    id: str
    version: str
    cluster: int
    mass: float
    adapter: Adapter


@dataclass(frozen=True)
class Deployment:
    """What is to be served."""

    bundle: str
    """Version of the bundle."""
    base_name: str
    experts: tuple[ServedExpert, ...]
    slots: int | None
    """LoRA places per worker; none: as many as it is given experts."""
    silence_s: float
    """Seconds without an answer after which a worker counts as down though it may be alive."""


class WorkerPort(Protocol):
    """A worker as the controller needs it."""

    async def status(self) -> WorkerStatus:
        """How it is; `WorkerLostError` if its process is gone."""
        ...

    async def serve(self, adapters: Sequence[Adapter]) -> None:
        """Tell it what to serve; `WorkerLostError` if its process is gone."""
        ...


class Controller:
    """The actor's body."""

    def __init__(self) -> None:
        """Know nothing yet.

        What to serve comes by `begin`: Ray keeps large constructor arguments in its object store
        only until the actor has begun, and so could not start it again (ray issue 53727).
        """
        self._course: _Course | None = None

    async def begin(
        self,
        deployment: Deployment,
        workers: Mapping[str, WorkerPort],
        nodes: Mapping[str, str],
        last: RoutingTable | None = None,
    ) -> None:
        """Plan the placement and look after the workers from now on.

        Args:
            deployment: what is to be served.
            workers: by id.
            nodes: address of each worker's node.
            last: the table of a controller before this one: it holds until a worker says otherwise.
        """
        if self._course is None:
            self._course = _Course(deployment, workers, nodes, last)

    async def table(self, after_version: int, timeout_s: float) -> RoutingTable | None:
        """The table, once it is newer than `after_version`; none if it is not in time.

        Raises:
            NotBegunError: it has not been told what to serve since Ray started it.
        """
        if self._course is None:
            raise NotBegunError("the controller waits to be told what to serve")
        return await self._course.table(after_version, timeout_s)

    async def end(self) -> None:
        """Leave the workers alone."""
        course, self._course = self._course, None
        if course is not None:
            await course.end()


class _Course:
    """A deployment in the care of the controller."""

    def __init__(
        self,
        deployment: Deployment,
        workers: Mapping[str, WorkerPort],
        nodes: Mapping[str, str],
        last: RoutingTable | None,
    ) -> None:
        self._deployment = deployment
        self._workers = workers
        self._placement = place(deployment, list(workers))
        self._entries = {worker: _unheard(worker, nodes[worker]) for worker in workers}
        if last is not None:
            self._entries |= {entry.id: entry for entry in last.workers}
        self._last_length = last.max_model_len if last else None
        self._lengths: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self._table = self._build(version=last.version if last else 1)
        self._tasks = [asyncio.create_task(self._watch(worker)) for worker in workers]

    async def table(self, after_version: int, timeout_s: float) -> RoutingTable | None:
        for task in self._tasks:
            if task.done():
                task.result()  # a fault of our own: let whoever asks see it
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._table.version > after_version)
        except TimeoutError:
            return None
        return self._table

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, worker: str) -> None:
        """Ask one worker how it is, for ever, and tell it what to serve when it does not know."""
        wanted = self._adapters_of(worker)
        names = tuple(adapter.served_name for adapter in wanted)
        heard_of = False
        last_answer = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    status = await self._workers[worker].status()
                    if status.assigned != names:
                        await self._workers[worker].serve(wanted)
                heard_of, last_answer = True, time.monotonic()
                await self._note(status.entry, status.max_model_len)
            except WorkerLostError as error:
                await self._note_silence(worker, str(error))
            except TimeoutError:
                if time.monotonic() - last_answer > self._deployment.silence_s:
                    await self._note_silence(worker, "it does not answer" if heard_of else UNBORN)
            await asyncio.sleep(POLL_S)

    async def _note(self, entry: WorkerEntry, max_model_len: int | None) -> None:
        if max_model_len is not None:
            self._lengths[entry.id] = max_model_len
        self._entries[entry.id] = entry
        await self._publish()

    async def _note_silence(self, worker: str, reason: str) -> None:
        gone: dict[str, Any] = {
            "state": "down",
            "url": None,
            "pid": None,
            "experts": [],
            "detail": reason,
        }
        self._entries[worker] = self._entries[worker].model_copy(update=gone)
        await self._publish()

    async def _publish(self) -> None:
        if self._build(version=self._table.version) != self._table:
            async with self._changed:
                self._table = self._build(version=self._table.version + 1)
                self._changed.notify_all()

    def _build(self, version: int) -> RoutingTable:
        return RoutingTable(
            version=version,
            bundle=self._deployment.bundle,
            base_name=self._deployment.base_name,
            max_model_len=min(self._lengths.values(), default=self._last_length),
            workers=list(self._entries.values()),
            experts=[
                ExpertHome(
                    id=expert.id,
                    version=expert.version,
                    served_name=expert.adapter.served_name,
                    cluster=expert.cluster,
                    workers=list(self._placement.homes[expert.id]),
                )
                for expert in self._deployment.experts
            ],
        )

    def _adapters_of(self, worker: str) -> list[Adapter]:
        mine = set(self._placement.experts_of(worker))
        return [expert.adapter for expert in self._deployment.experts if expert.id in mine]


def place(deployment: Deployment, workers: Sequence[str]) -> Placement:
    """Where the deployment's experts live.

    Raises:
        ServingConfigError: there is no worker.
    """
    return plan_placement(
        [ExpertDemand(e.id, e.mass, e.adapter.rank) for e in deployment.experts],
        [WorkerCapacity(worker, deployment.slots) for worker in workers],
    )


def create_controller() -> Any:
    """Create the controller's actor; Ray starts it again whenever it dies."""
    return ray.remote(Controller).options(num_cpus=0, max_restarts=-1, max_task_retries=0).remote()


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
