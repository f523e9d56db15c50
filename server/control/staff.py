"""Workers hired on the nodes of the Ray cluster: made, found again, dismissed.

Knows nothing of what they serve.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from configs.schema import ServingConfig
from server.control.state import HiredWorker
from server.orders import Post
from server.process import STOP_TIMEOUT_S
from server.topology import Node, WorkerSpec, plan_workers, replan_workers
from server.worker import EngineSettings, WorkerHandle, create_worker

logger = logging.getLogger(__name__)


class Staff:
    """The workers of one run."""

    def __init__(self, run: str, serving: ServingConfig, settings: EngineSettings) -> None:
        """Nobody is hired yet.

        Args:
            run: prefix of the names of this run's actors.
            serving: how many workers, and how large.
            settings: what all engines have in common.
        """
        self._run = run
        self._serving = serving
        self._settings = settings
        self._hired: dict[str, HiredWorker] = {}
        self._handles: dict[str, WorkerHandle] = {}
        self._adopted: set[str] = set()

    @property
    def hired(self) -> tuple[HiredWorker, ...]:
        """Who works, to be found again by `adopt`."""
        return tuple(self._hired.values())

    @property
    def posts(self) -> dict[str, Post]:
        """The workers by id, as the controller is told of them."""
        return {
            worker: Post(
                name=hired.actor,
                worker=self._handles[worker],
                node=hired.address,
                adopted=worker in self._adopted,
            )
            for worker, hired in self._hired.items()
        }

    def adopt(self, hired: Sequence[HiredWorker]) -> None:
        """Go on with those of a control process before this one that are still there."""
        for worker in hired:
            with suppress(ValueError):  # no such actor: another Ray, or it was dismissed
                self._handles[worker.id] = WorkerHandle(ray.get_actor(worker.actor))
                self._hired[worker.id] = worker
                self._adopted.add(worker.id)

    def fill(self, nodes: Sequence[Node]) -> bool:
        """Dismiss workers whose nodes are gone, hire where there is room; whether any changed.

        Raises:
            TopologyError: nobody is hired yet, and the cluster has no room for what is asked.
        """
        before = [worker.spec for worker in self._hired.values()]
        specs = (
            replan_workers(before, nodes, self._serving)
            if before
            else plan_workers(nodes, self._serving)
        )
        for spec in before:
            if spec not in specs:
                logger.warning("%s: its node %s is gone", spec.id, spec.address)
                self._dismiss(spec)
        for spec in specs:
            if spec.id not in self._hired:
                self._hire(spec)
        return set(before) != set(specs)

    async def end(self) -> None:
        """Have every worker end its engine, all at once; then end the workers."""
        actors = [handle.actor for handle in self._handles.values()]
        stopping = [actor.stop.remote() for actor in actors]
        if stopping:
            await asyncio.to_thread(
                ray.wait, stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S
            )
        for actor in actors:
            kill(actor)

    def _hire(self, spec: WorkerSpec) -> None:
        name = f"{self._run}{spec.id}-{secrets.token_hex(4)}"
        self._handles[spec.id] = create_worker(
            spec.id,
            name=name,
            node_id=spec.node_id,
            address=spec.address,
            cpus=spec.cpus,
            gpus=spec.gpus,
            cores=spec.cores,
            settings=self._settings,
        )
        self._hired[spec.id] = HiredWorker.of(spec, name)
        self._adopted.discard(spec.id)

    def _dismiss(self, spec: WorkerSpec) -> None:
        del self._hired[spec.id]
        kill(self._handles.pop(spec.id).actor)


def kill(actor: Any) -> None:
    """End an actor for good."""
    try:
        ray.kill(actor, no_restart=True)
    except RayError as error:
        logger.warning("an actor cannot be ended: %s", str(error).splitlines()[0])


def list_nodes() -> list[Node]:
    """The nodes of the Ray cluster that are alive."""
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
