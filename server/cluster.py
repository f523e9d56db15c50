"""Everything that serves a bundle, brought up in order and taken down in reverse.

The driver owns all of it: when the context ends, for whatever reason, no process is left. It has
no part in serving and is not connected to Ray: it starts the control process and the gateways, and
starts again whichever dies.

Knows nothing of the command line, nor of what any of these processes does inside.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from configs.schema import RunConfig
from expert_trainer.base import resolve_base
from expert_trainer.bundle import open_published
from server.batch_process import BatchProcess
from server.control.bundles import check_base
from server.control_process import ControlProcess
from server.engine import check_engine_args
from server.errors import EngineFailedError, NotReadyError, PortTakenError, ServingConfigError
from server.gateway_process import GatewayProcesses
from server.lodging import keep, make_run_dir
from server.process import is_free
from server.table import ENGINE_KEY_FILE, TABLE_FILE, RoutingTable, read_table

WAIT_POLL_S = 0.1


class Cluster:
    """Control plane and gateways of one run.

        with Cluster(config) as cluster:
            cluster.wait_ready()
            ... cluster.url ...

    Entering raises an `IntrovertError` that says what is wrong, with everything taken down again.
    """

    def __init__(self, config: RunConfig) -> None:
        """Describe the cluster; nothing is started yet."""
        self._config = config
        self._resources = ExitStack()
        self._gateway: GatewayProcesses | None = None
        self._control: ControlProcess | None = None
        self._table_file = Path()
        self._ending = threading.Event()

    def __enter__(self) -> Self:
        """Bring everything up; the workers' engines come later, see `wait_ready`.

        Raises:
            PortTakenError: another process has the gateway's port.
            BundleError: the bundle is not there or damaged.
            StorageError: it cannot be reached.
            BaseModelError: the base is not there.
            ServingConfigError: the config contradicts itself, or the base is not the bundle's.
            ControlFailedError: the control plane does not start, as when Ray cannot be reached or
                the cluster has no room for the workers.
            GatewayFailedError: the gateway does not start.
        """
        check_port(self._config)
        bundle = open_published(self._config.bundle)
        check_base(bundle, resolve_base(self._config.base))
        check_engine_args(self._config.serving)
        with ExitStack() as stack:
            run_dir = make_run_dir(self._config, stack)
            self._table_file = run_dir / TABLE_FILE
            self._control = ControlProcess(self._config, run_dir=run_dir, log_dir=self._log_dir)
            stack.callback(self._control.stop)
            self._control.start()
            self._gateway = GatewayProcesses(self._config, run_dir=run_dir, log_dir=self._log_dir)
            stack.callback(self._gateway.stop)
            self._gateway.start()
            batches = BatchProcess(
                self._config, run_dir=run_dir, log_dir=self._log_dir, url=self._gateway.url
            )
            stack.callback(batches.stop)
            batches.start()
            control, ending = self._control, self._ending
            keep(stack, "gateway keeper", self._gateway.revive, ending)
            keep(stack, "batch keeper", batches.revive, ending)
            keep(stack, "control keeper", lambda: control.revive(ending.is_set), ending)
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take everything down, the gateways first; return when no process is left."""
        self._resources.close()

    @property
    def url(self) -> str:
        """Root of the gateway's HTTP API."""
        assert self._gateway, "the cluster has been entered"
        return self._gateway.url

    @property
    def run_dir(self) -> Path:
        """Where the table lies, and the sockets of all processes."""
        return self._table_file.parent

    @property
    def engine_key(self) -> str:
        """What the workers' engines ask of their callers."""
        key = self._table_file.with_name(ENGINE_KEY_FILE).read_text(encoding="utf-8")
        return key.strip()

    @property
    def table(self) -> RoutingTable:
        """The newest routing table."""
        return read_table(self._table_file)

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

    @property
    def _log_dir(self) -> Path:
        return (self._config.bundle.scratch / "logs").resolve()


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
