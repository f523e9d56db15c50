"""Engines for a batch alone: a control plane and its workers on Ray, without a gateway.

Everything that serving has is here, too: experts verified by their fingerprints, engines, actors
and nodes that come back, nothing left behind when the driver ends, however it ends. Knows nothing
of lines.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Self

from configs.schema import RunConfig
from expert_trainer.base import resolve_base
from expert_trainer.bundle import Bundle, open_published
from server.control.bundles import check_base
from server.control_process import ControlProcess
from server.engine import check_engine_args
from server.gateway_reports import SocketError, ask
from server.lodging import keep, make_run_dir
from server.table import (
    CONTROL_SOCKET,
    ENGINE_KEY_FILE,
    TABLE_FILE,
    RoutingTable,
    read_table,
    table_identity,
)

log = logging.getLogger(__name__)

MOST_HOMES = 64
"""Of one expert: as many workers as there are may work on what is left."""
TELL_S = 10.0


class BatchEngines:
    """The engines of one batch.

        with BatchEngines(config) as engines:
            ... engines.table ...

    Entering returns while the engines start; it raises an `IntrovertError` that says what is wrong,
    with everything taken down again.
    """

    bundle: Bundle
    """What they hold."""
    run_dir: Path
    """Where the table lies."""
    engine_key: str
    """What they ask of their callers."""

    def __init__(self, config: RunConfig) -> None:
        """Describe them; nothing is started yet."""
        # what is asked for is known, and need not be measured
        serving = config.serving.model_copy(update={"rebalance_s": 0.0, "max_replicas": MOST_HOMES})
        self._config = config.model_copy(update={"serving": serving})
        self._resources = ExitStack()
        self._table_file = Path()
        self._table: tuple[tuple[int, int, int], RoutingTable] | None = None
        self._ending = threading.Event()

    def __enter__(self) -> Self:
        """Bring them up.

        Raises:
            BundleError: the bundle is not there or damaged.
            StorageError: it cannot be reached.
            BaseModelError: the base is not there.
            ServingConfigError: the config contradicts itself, or the base is not the bundle's.
            ControlFailedError: the control plane does not start.
        """
        config = self._config
        self.bundle = open_published(config.bundle)
        check_base(self.bundle, resolve_base(config.base))
        check_engine_args(config.serving)
        with ExitStack() as stack:
            self.run_dir = make_run_dir(config, stack, "batch")
            self._table_file = self.run_dir / TABLE_FILE
            key = self.run_dir / ENGINE_KEY_FILE
            self.engine_key = key.read_text(encoding="utf-8").strip()
            logs = (config.bundle.scratch / "logs").resolve()
            control = ControlProcess(config, run_dir=self.run_dir, log_dir=logs, offline=True)
            stack.callback(control.stop)
            control.start()
            ending = self._ending
            keep(stack, "control keeper", lambda: control.revive(ending.is_set), ending)
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take everything down; return when no process is left."""
        self._resources.close()

    @property
    def table(self) -> RoutingTable:
        """The newest routing table; the same object until there is another."""
        identity = table_identity(self._table_file)
        if self._table is None or identity != self._table[0]:
            self._table = identity, read_table(self._table_file)
        return self._table[1]

    def demand(self, rates: Mapping[str, float]) -> None:
        """Have experts placed by what is left for them: engines' worth of work, by expert id."""
        body = json.dumps({"rates": dict(rates)}).encode()
        control = self.run_dir / CONTROL_SOCKET
        try:
            status, answer = asyncio.run(ask(control, "POST", "/demand", body, TELL_S))
        except SocketError as error:
            status, answer = 0, str(error).encode()
        if status != HTTPStatus.OK:
            log.warning("the control plane does not hear what is left: %s", answer.decode())
