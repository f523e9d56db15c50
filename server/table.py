"""The routing table: what the control plane tells the gateways.

The table travels as one JSON file, replaced by rename, so that a gateway reads a whole table or
the one before it, needs no connection to Ray, and keeps the last one when the control plane dies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

TABLE_FILE = "table.json"
ENGINE_KEY_FILE = "engine.key"
"""Beside the table's file: the key that engines ask for, readable by its owner alone."""
CONTROL_SOCKET = "control.sock"
"""Beside it: the control plane's own HTTP API, on a Unix socket."""
GATEWAY_SOCKET = "gateway-{}.sock"
"""Beside it: one gateway process' own HTTP API, by its number."""

ROUTED_MODEL = "introvert"
"""The model name that routes by meaning."""

WorkerState = Literal["starting", "ready", "down", "failed"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class WorkerEntry(_Entry):
    """One worker as last seen by the controller."""

    id: str
    """`worker-0`, stable over restarts."""
    state: WorkerState
    """`ready`: the engine has generated a token with every expert listed in `experts`."""
    url: str | None
    """Root of the engine's HTTP API, such as `http://127.0.0.1:31001`; none before it has one."""
    node: str
    """Address of the node the worker runs on."""
    devices: str
    """What it is pinned to: `cuda:0`, `cuda:0,1` or `cores:0-3`."""
    engine: str
    """Engine and version: `vllm 0.32.0`; empty before it is known."""
    pid: int | None
    """Process id of the engine's API server on its node."""
    experts: list[str]
    """Served names (`expert-0007@3f2a9c…`) that are loaded and verified."""
    restarts: int
    """Times the engine was started again after it had been lost."""
    detail: str
    """Why the worker is not ready, or which experts it refused and why; empty when all is well."""
    refused: dict[str, str] = {}
    """Served names of the experts that it was told to serve and will not, each with the reason."""
    slots: int | None = None
    """LoRA places of its engine; none before it is known."""


class ExpertHome(_Entry):
    """Where one served expert lives."""

    id: str
    version: str
    served_name: str
    cluster: int
    workers: list[str]
    """Ids of the workers the placement gives it, ready or not."""


class Canary(_Entry):
    """A bundle beside the one that is served, on its way to take its place."""

    bundle: str
    """Its version."""
    place: str
    """Its directory or URL."""
    share: float
    """Share of the conversations that it answers, in [0, 1]; 0: it is only being made ready."""
    experts: list[ExpertHome]


class RoutingTable(_Entry):
    """Everything a gateway needs to forward."""

    version: int
    """Grows with every change."""
    bundle: str
    """Version of the bundle that is served."""
    place: str = ""
    """Its directory or URL; empty: as configured."""
    base_name: str
    """Model name of the base, the same in every engine."""
    max_model_len: int | None
    """Context length of the engines, tokens; none before the first engine told it."""
    workers: list[WorkerEntry]
    experts: list[ExpertHome]
    canary: Canary | None = None
    """The bundle that is to be served next, if one is."""

    def ready_workers(self, served_name: str | None) -> list[WorkerEntry]:
        """Workers that can answer for an expert now, or for the base (`served_name` none)."""
        return [
            worker
            for worker in self.workers
            if worker.state == "ready" and (served_name is None or served_name in worker.experts)
        ]

    def refused_experts(self) -> set[str]:
        """Served names of the experts that no worker will have: every home is ready and has refused
        them. Waiting does not help, unlike where a home is still to come or still loads them."""
        refused = {worker.id: worker.refused for worker in self.workers if worker.state == "ready"}
        return {
            expert.served_name
            for expert in self.experts
            if expert.workers
            and all(expert.served_name in refused.get(home, ()) for home in expert.workers)
        }


def write_table(path: Path, table: RoutingTable) -> None:
    """Replace the table file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(table.model_dump_json(), encoding="utf-8")
    temporary.replace(path)


def table_identity(path: Path) -> tuple[int, int, int]:
    """What tells the file of one table from that of the next, which replaces it by rename.

    Raises:
        FileNotFoundError: no table has been written yet.
    """
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_table(path: Path) -> RoutingTable:
    """Read the table file.

    Raises:
        FileNotFoundError: no table has been written yet.
    """
    return RoutingTable.model_validate_json(path.read_text(encoding="utf-8"))
