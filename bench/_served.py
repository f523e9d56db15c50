"""`introvert serve` on a small world with real engines, as the tests' own world is made."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from _stand import DIRECT, Program, running

from server.table import ENGINE_KEY_FILE, RoutingTable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.end_to_end.conftest import World, build_world

READY_S = 300.0
MARK = "INTROVERT_BENCH"


@dataclass
class Served:
    """A running `introvert serve`."""

    program: Program
    world: World
    work: Path
    url: str
    mark: str

    def status(self) -> dict[str, Any]:
        """What the gateway knows; raises OSError where none answers."""
        with DIRECT.open(f"{self.url}/admin/status", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def change(self) -> dict[str, Any]:
        """What the control plane says of its bundle; raises OSError where none answers."""
        with DIRECT.open(f"{self.url}/admin/bundle", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def table(self) -> RoutingTable:
        return RoutingTable.model_validate(self.status()["table"])

    def engine_headers(self) -> dict[str, str]:
        """What an engine wants of those who ask it themselves."""
        keys = list(self.work.rglob(ENGINE_KEY_FILE))
        return {"authorization": f"Bearer {keys[0].read_text().strip()}"} if keys else {}

    def processes(self) -> list[psutil.Process]:
        """Every process that this service started, wherever in the system's tree it is now."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def made_world(here: Path) -> World:
    """The world below `here`, made where it is not there yet."""
    root = here / "world"
    if (root / "bundle" / "manifest.json").is_file():
        return World(root=root, base=root / "base", bundle=root / "bundle")
    return build_world(root)


@contextmanager
def served(
    here: Path, world: World, env: dict[str, str] | None = None, **sections: dict[str, Any]
) -> Iterator[Served]:
    """A service with two engines, once it is ready; ended with the block.

    Args:
        here: for its files.
        world: what it serves.
        env: more environment variables; one named as `MARK` marks processes beside its own.
        sections: of the configuration.
    """
    work = here / "work"
    work.mkdir(parents=True, exist_ok=True)
    config = here / "config.json"
    config.write_text(world.config(work, **sections).model_dump_json())
    env = {MARK: uuid.uuid4().hex, **(env or {})}
    log = here / "serve.log"
    command = [Path(sys.executable).with_name("introvert"), "serve", config]
    with running(command, log, env=env) as program:
        deadline = time.monotonic() + READY_S
        while "ready: " not in log.read_text():
            if program.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the service does not start; see {log}")
            time.sleep(0.2)
        url = log.read_text().partition("ready: ")[2].partition("/v1")[0]
        service = Served(program, world, work, url, env[MARK])
        try:
            yield service
        finally:
            everyone = service.processes()
    gone = time.monotonic() + 10
    while any(p.is_running() for p in everyone) and time.monotonic() < gone:
        time.sleep(0.2)
