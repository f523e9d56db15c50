"""Everything that serves a bundle, brought up in order and taken down in reverse.

The driver owns all of it: when the context ends, for whatever reason, no process is left.

Knows nothing of the command line, nor of what a worker or a gateway does inside.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayError

from configs.schema import BaseConfig, RunConfig
from expert_trainer.base import base_digest, resolve_base
from expert_trainer.bundle import Bundle, open_published
from expert_trainer.runtime import ray_session
from server.controller import Deployment, ServedExpert, create_controller
from server.engine import Adapter, accepted_rank, check_engine_args
from server.errors import (
    EngineFailedError,
    NotBegunError,
    NotReadyError,
    PortTakenError,
    ServerError,
    ServingConfigError,
)
from server.gateway_process import GatewayProcess
from server.process import STOP_TIMEOUT_S, is_free
from server.table import RoutingTable, write_table
from server.topology import Node, WorkerSpec, plan_workers
from server.worker import EngineSettings, WorkerHandle, create_worker

log = logging.getLogger(__name__)

LONG_POLL_S = 1.0
"""Longest that the keeper waits for news; also how soon it notices that it is to end."""
ANSWER_MARGIN_S = 5.0
FIRST_TABLE_S = 120.0
WAIT_POLL_S = 0.1


class Cluster:
    """Controller, workers and gateway of one run.

        with Cluster(config) as cluster:
            cluster.wait_ready()
            ... cluster.url ...

    Entering raises an `IntrovertError` that says what is wrong, with everything taken down again.
    """

    def __init__(self, config: RunConfig) -> None:
        """Describe the cluster; nothing is started yet."""
        self._config = config
        self._resources = ExitStack()
        self._gateway: GatewayProcess | None = None
        self._table: RoutingTable | None = None
        self._controller: Any = None
        self._task: tuple[Deployment, dict[str, WorkerHandle], dict[str, str]] | None = None
        self._ending = threading.Event()

    def __enter__(self) -> Self:
        """Bring everything up; the workers' engines come later, see `wait_ready`.

        Raises:
            PortTakenError: another process has the gateway's port.
            BundleError: the bundle is not there or damaged.
            StorageError: it cannot be reached.
            BaseModelError: the base is not there.
            ServingConfigError: the config does not fit the bundle or the machine.
            PoolError: Ray cannot be reached or started.
            GatewayFailedError: the gateway does not start.
        """
        check_port(self._config)
        bundle = open_published(self._config.bundle)
        base = resolve_base(self._config.base)
        check_base(bundle, base)
        deployment = describe(bundle, self._config, base)
        with ExitStack() as stack:
            stack.callback(self._ending.set)
            run_dir = self._make_run_dir(stack)
            stack.enter_context(ray_session())
            specs = plan_workers(list_nodes(), self._config.serving)
            workers = self._create_workers(specs, base, stack)
            nodes = {spec.id: spec.address for spec in specs}
            self._task = (deployment, workers, nodes)
            self._controller = create_controller()
            stack.callback(_kill, self._controller)
            self._gateway = self._start_gateway(run_dir, stack)
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take everything down, the gateway first; return when no process is left."""
        self._resources.close()

    @property
    def url(self) -> str:
        """Root of the gateway's HTTP API."""
        assert self._gateway, "the cluster has been entered"
        return self._gateway.url

    @property
    def table(self) -> RoutingTable:
        """The newest routing table."""
        assert self._table, "the cluster has been entered"
        return self._table

    def wait_ready(self, timeout_s: float | None = None) -> RoutingTable:
        """Wait until every worker is ready and the gateway serves by what they hold.

        Args:
            timeout_s: how long; default: until each is ready or has failed.

        Raises:
            EngineFailedError: a worker gave up; with the last lines of its engine's log.
            GatewayFailedError: the gateway cannot load its router.
            NotReadyError: time is up; with what each worker waits for.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while waiting := self._waiting():
            if deadline is not None and time.monotonic() > deadline:
                raise NotReadyError(f"not ready after {timeout_s:g} s: {'; '.join(waiting)}")
            time.sleep(WAIT_POLL_S)
        return self.table

    def _waiting(self) -> list[str]:
        """What is not ready yet, and why."""
        assert self._gateway, "the cluster has been entered"
        table = self.table
        for worker in table.workers:
            if worker.state == "failed":
                raise EngineFailedError(worker.id, worker.detail)
        waiting = [f"{w.id} is {w.state}: {w.detail}" for w in table.workers if w.state != "ready"]
        if not waiting and (reason := self._gateway.waits_for(table.version)):
            waiting.append(reason)
        return waiting

    def _make_run_dir(self, stack: ExitStack) -> Path:
        run_dir = (self._config.bundle.scratch / f"serving-{os.getpid()}").resolve()
        run_dir.mkdir(parents=True, exist_ok=True)
        run_dir.chmod(0o700)  # the config in it may hold a URL's password
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        return run_dir

    @property
    def _log_dir(self) -> Path:
        return (self._config.bundle.scratch / "logs").resolve()

    def _create_workers(
        self, specs: list[WorkerSpec], base: BaseConfig, stack: ExitStack
    ) -> dict[str, WorkerHandle]:
        settings = EngineSettings(base=base, serving=self._config.serving, log_dir=self._log_dir)
        workers: dict[str, WorkerHandle] = {}
        stack.callback(_stop_workers, workers)
        for spec in specs:
            workers[spec.id] = create_worker(
                spec.id,
                node_id=spec.node_id,
                address=spec.address,
                cpus=spec.cpus,
                gpus=spec.gpus,
                cores=spec.cores,
                settings=settings,
            )
        return workers

    def _start_gateway(self, run_dir: Path, stack: ExitStack) -> GatewayProcess:
        table_file = run_dir / "table.json"
        self._table = self._first_table()
        write_table(table_file, self._table)
        gateway = GatewayProcess(
            self._config,
            config_file=run_dir / "config.json",
            table_file=table_file,
            log_file=self._log_dir / "gateway.log",
        )
        stack.callback(gateway.stop)
        gateway.start()
        keeper = threading.Thread(
            target=self._keep, args=(table_file, gateway), name="keeper", daemon=True
        )
        keeper.start()
        stack.callback(keeper.join)
        stack.callback(self._ending.set)
        return gateway

    def _first_table(self) -> RoutingTable:
        try:
            self._begin()
            table: RoutingTable = ray.get(self._controller.table.remote(0, FIRST_TABLE_S))
        except GetTimeoutError:
            raise ServerError(
                f"Ray did not start the controller within {FIRST_TABLE_S:g} s; "
                "see whether the cluster has free memory"
            ) from None
        return table

    def _begin(self) -> None:
        assert self._task, "the workers are there"
        ray.get(self._controller.begin.remote(*self._task, self._table), timeout=FIRST_TABLE_S)

    def _keep(self, table_file: Path, gateway: GatewayProcess) -> None:
        """Until the end: bring every new table to the gateways' file, revive a dead gateway."""
        while not self._ending.is_set():
            try:
                table = self._next_table()
                if table is not None:
                    self._table = table
                    write_table(table_file, table)
                gateway.revive()
            except OSError as error:  # a full disk, no process to be had: it may pass
                log.error("the gateway is not up to date: %s", error)
                self._ending.wait(LONG_POLL_S)

    def _next_table(self) -> RoutingTable | None:
        try:
            table: RoutingTable | None = ray.get(
                self._controller.table.remote(self.table.version, LONG_POLL_S),
                timeout=LONG_POLL_S + ANSWER_MARGIN_S,
            )
        except NotBegunError:
            self._begin_again()
            return None
        except RayError as error:  # the gateway goes on with the last table meanwhile
            self._note_silence(error)
            return None
        return table

    def _begin_again(self) -> None:
        try:
            self._begin()
        except RayError as error:
            self._note_silence(error)

    def _note_silence(self, error: RayError) -> None:
        log.warning("no news from the controller: %s", str(error).splitlines()[0])
        self._ending.wait(LONG_POLL_S)


def check_port(config: RunConfig) -> None:
    """See that the gateway's port is free.

    Raises:
        PortTakenError: it is not.
        ServingConfigError: the host is no address of this machine.
    """
    host, port = config.gateway.host, config.gateway.port
    try:
        free = port == 0 or is_free(host, port)
    except OSError as error:
        raise ServingConfigError(
            f"the gateway cannot listen on {host}:{port} ({error.strerror}); "
            "choose another gateway.host or gateway.port"
        ) from None
    if not free:
        raise PortTakenError(host, port)


def check_base(bundle: Bundle, base: BaseConfig) -> None:
    """See that the base is the one that the bundle's experts belong to.

    Raises:
        BaseModelError: it is not there.
        ServingConfigError: it is another.
    """
    if base_digest(base) != bundle.manifest.base.digest:
        raise ServingConfigError(
            f"base.model {base.model} is not what the experts of {bundle.place} were trained on "
            f"({bundle.manifest.base.model}); set base.model to that, or train again"
        )


def describe(bundle: Bundle, config: RunConfig, base: BaseConfig) -> Deployment:
    """What of a bundle is to be served.

    Raises:
        ServingConfigError: engine arguments or ranks that no engine takes.
        DamagedBundleError: a card cannot be read.
    """
    check_engine_args(config.serving)
    experts, served = [], bundle.manifest.served
    for entry, card in zip(served, bundle.cards(served), strict=True):
        accepted_rank(entry.rank)
        adapter = Adapter(
            served_name=entry.served_name,
            path=str(bundle.place_of(entry).resolve()),
            rank=entry.rank,
            fingerprint=card.fingerprint,
            source=bundle.expert(entry),
        )
        experts.append(ServedExpert(entry.id, entry.version, entry.cluster, entry.mass, adapter))
    slots = config.serving.slots
    return Deployment(
        bundle=bundle.manifest.version,
        base_name=base.served_name,
        experts=tuple(experts),
        slots=None if slots == "auto" else slots,
        silence_s=config.serving.hang_timeout_s,
    )


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


def _stop_workers(workers: dict[str, WorkerHandle]) -> None:
    """Have every worker end its engine, all at once; then end the workers."""
    actors = [worker.actor for worker in workers.values()]
    stopping = [actor.stop.remote() for actor in actors]
    ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
    for actor in actors:
        _kill(actor)


def _kill(actor: Any) -> None:
    ray.kill(actor, no_restart=True)
