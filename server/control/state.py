"""What a control process leaves in the run's directory for the one after it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.manifest import BundleManifest
from server.control.change import Change
from server.topology import WorkerSpec

STATE_FILE = "control.json"


class HiredWorker(BaseModel):
    """A worker and the name of its actor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    actor: str
    id: str
    node_id: str
    address: str
    gpus: int
    cpus: int
    cores: tuple[int, ...]

    @classmethod
    def of(cls, spec: WorkerSpec, actor: str) -> HiredWorker:
        """A specification that an actor lives by."""
        return cls(actor=actor, **asdict(spec))

    @property
    def spec(self) -> WorkerSpec:
        """What it was made from."""
        fields: dict[str, Any] = self.model_dump(exclude={"actor"})
        return WorkerSpec(**fields)


class ControlState(BaseModel):
    """What has to survive the control process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    """Prefix of the names of this run's actors."""
    place: str = ""
    """Directory or URL of the bundle that was published last; empty: as configured."""
    manifest: BundleManifest | None = None
    """Its manifest: another may lie at that place by now."""
    workers: tuple[HiredWorker, ...] = ()
    change: Change | None = None
    """The change of bundles under way, or the last one."""


def read_state(run_dir: Path) -> ControlState | None:
    """What the control process before left; none for the first one."""
    try:
        return ControlState.model_validate_json((run_dir / STATE_FILE).read_bytes())
    except FileNotFoundError:
        return None


def write_state(run_dir: Path, state: ControlState) -> None:
    """Replace it, whole."""
    path = run_dir / STATE_FILE
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(state.model_dump_json(), encoding="utf-8")
    temporary.replace(path)
