"""The worker: a Ray actor that owns one engine and the devices it computes on.

It is told what to serve by the controller and forgets it when Ray starts it again; whoever asks
for its status sees that. Its engine never outlives it (see `server.guard`).

Knows nothing of placement, of other workers, or of the bundle.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.schema import BaseConfig, ServingConfig
from server.engine import Adapter, Devices, EngineCommand, Room, build_command
from server.errors import WorkerLostError
from server.supervisor import Identity, Supervisor
from server.table import WorkerEntry


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker says of itself."""

    entry: WorkerEntry
    assigned: tuple[str, ...] | None
    """Served names it was told to load; none: it has not been told anything since it began."""
    max_model_len: int | None
    """Context length of its engine, tokens."""


@dataclass(frozen=True)
class EngineSettings:
    """What the engines of all workers have in common."""

    base: BaseConfig
    """`model` is a hub name or an absolute path."""
    serving: ServingConfig
    log_dir: Path
    api_key: str | None = field(default=None, repr=False)
    """What engines ask of their callers; none: nothing."""
    offline: bool = False
    """Whether they are a batch's."""


class Worker:
    """The actor's body."""

    def __init__(self, worker_id: str, node: str, cores: Sequence[int], settings: EngineSettings):
        """Take the devices that Ray gave this actor.

        Args:
            worker_id: such as `worker-0`.
            node: address of the node, on which the engine listens.
            cores: places in this node's list of usable cores; not looked at with GPUs.
            settings: what all engines have in common.
        """
        self._settings = settings
        self._devices = _own_devices(cores)
        self._identity = Identity(worker_id, node, self._devices.label)
        self._assigning = asyncio.Lock()
        self._assigned: tuple[str, ...] | None = None
        self._supervisor: Supervisor | None = None

    async def serve(self, adapters: Sequence[Adapter]) -> None:
        """Serve the base and these experts, in place of what was served before.

        The engine goes on: what is new is loaded and verified in it, what is gone unloaded then.
        The latest call wins, also while the one before is being carried out.
        """
        names = tuple(adapter.served_name for adapter in adapters)
        async with self._assigning:
            if self._supervisor is None:
                self._supervisor = self._supervise(adapters)
                self._supervisor.start()
            elif names != self._assigned:
                self._supervisor.serve(adapters)
            self._assigned = names

    async def status(self) -> WorkerStatus:
        """How it is now."""
        if self._supervisor is None:
            return WorkerStatus(self._idle(), None, None)
        return WorkerStatus(self._supervisor.entry, self._assigned, self._supervisor.max_model_len)

    async def stop(self) -> None:
        """End the engine; return when its last process is gone."""
        if self._supervisor is not None:
            self._assigned = None
            await self._supervisor.stop()
            self._supervisor = None

    def _supervise(self, adapters: Sequence[Adapter]) -> Supervisor:
        return Supervisor(
            identity=self._identity,
            command_for=self._command,
            base_name=self._settings.base.served_name,
            adapters=adapters,
            serving=self._settings.serving,
            log_path=self._settings.log_dir / f"{self._identity.id}.log",
            api_key=self._settings.api_key,
        )

    def _command(self, room: Room | None, host: str, port: int) -> EngineCommand:
        return build_command(
            base=self._settings.base,
            serving=self._settings.serving,
            devices=self._devices,
            room=room,
            host=host,
            port=port,
            api_key=self._settings.api_key,
            offline=self._settings.offline,
        )

    def _idle(self) -> WorkerEntry:
        return WorkerEntry(
            id=self._identity.id,
            state="starting",
            url=None,
            node=self._identity.node,
            devices=self._identity.devices,
            engine="",
            pid=None,
            experts=[],
            restarts=0,
            detail="it waits for its experts",
        )


class WorkerHandle:
    """A worker as seen from another process."""

    def __init__(self, actor: Any) -> None:
        """Wrap the actor's handle."""
        self.actor = actor

    async def status(self) -> WorkerStatus:
        """How the worker is.

        Raises:
            WorkerLostError: its process is dead, or a fault of its own ended it.
        """
        status: WorkerStatus = await _answer(self.actor.status.remote())
        return status

    async def serve(self, adapters: Sequence[Adapter]) -> None:
        """Tell it what to serve.

        Raises:
            WorkerLostError: as above.
        """
        await _answer(self.actor.serve.remote(adapters))


def create_worker(
    worker_id: str,
    *,
    name: str,
    node_id: str,
    address: str,
    cpus: int,
    gpus: int,
    cores: Sequence[int],
    settings: EngineSettings,
) -> WorkerHandle:
    """Create a worker's actor on a node; Ray starts it again whenever it dies.

    It outlives whoever creates it, who must kill it, or find it by its name and go on.
    A call that its death interrupts is not repeated: the controller asks again soon.
    """
    actor = (
        ray.remote(Worker)
        .options(
            name=name,
            lifetime="detached",
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(worker_id, address, cores, settings)
    )
    return WorkerHandle(actor)


async def _answer(reference: Any) -> Any:
    try:
        return await reference
    except RayActorError:
        raise WorkerLostError("its process is gone; Ray starts it again") from None
    except RayError as error:
        raise WorkerLostError(f"it failed: {str(error).strip().splitlines()[-1]}") from error


def _own_devices(places: Sequence[int]) -> Devices:
    gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
    if gpus:
        return Devices(gpus=gpus)
    usable = sorted(os.sched_getaffinity(0))
    # several nodes may be simulated on one machine, which then has fewer cores than they say
    return Devices(cores=tuple(sorted({usable[place % len(usable)] for place in places})))
