"""Starts that fail and drivers that die: nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.cluster import Cluster
from server.errors import EngineFailedError, PortTakenError
from server.table import read_table

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LeftBehind = Callable[[], list[str]]
READY_S = 300.0


def test_an_engine_that_cannot_start_is_reported_and_leaves_nothing(
    world: Any, tmp_path: Path, left_behind: LeftBehind
) -> None:
    serving = {"workers": 1, "max_failed_starts": 1, "engine_args": {"no-such-flag": True}}
    with (
        pytest.raises(EngineFailedError, match="unrecognized arguments: --no-such-flag"),
        Cluster(world.config(tmp_path, serving=serving)) as cluster,
    ):
        cluster.wait_ready(READY_S)
    assert left_behind() == []


def test_a_taken_port_is_said_before_anything_starts(
    world: Any, tmp_path: Path, taken_port: int, left_behind: LeftBehind
) -> None:
    with (
        pytest.raises(PortTakenError, match=f"port {taken_port} on 127.0.0.1 is taken"),
        Cluster(world.config(tmp_path, gateway={"port": taken_port})),
    ):
        raise AssertionError("it must not start")
    assert not list(tmp_path.glob("logs/*.pid"))
    assert left_behind() == []


def test_sigterm_while_engines_start_leaves_nothing(
    world: Any,
    serve: Callable[..., Any],
    left_behind: LeftBehind,
    tmp_path: Path,
) -> None:
    command = serve(world.config(tmp_path), tmp_path)
    try:
        deadline = time.monotonic() + READY_S
        while len(list(tmp_path.glob("logs/*.pid"))) < 2:
            assert command.process.poll() is None, command.errors
            assert time.monotonic() < deadline, command.errors
            time.sleep(0.05)
        command.process.terminate()
        began = time.monotonic()
        assert command.process.wait(120) == 128 + signal.SIGTERM
        print(f"\nended in {time.monotonic() - began:.1f} s")
    finally:
        command.close()
    assert left_behind() == []
    assert "ready" not in command.output
    assert "Traceback" not in command.errors
    assert "introvert: terminated" in command.errors


def test_a_driver_killed_with_sigkill_leaves_no_process(
    world: Any, tmp_path: Path, left_behind: LeftBehind
) -> None:
    config_file = tmp_path / "config.json"
    config_file.write_text(world.config(tmp_path, serving={"workers": 1}).model_dump_json())
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from configs.schema import RunConfig\nfrom server.cluster import Cluster\n"
        "config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "with Cluster(config) as cluster:\n    time.sleep(900)\n"
    )
    # its files stay behind, as nobody is there to remove them; Ray's sockets need a short path
    with tempfile.TemporaryDirectory(prefix="killed-") as scratch:
        driver = subprocess.Popen(
            [sys.executable, "-c", script, str(config_file)],
            env={**os.environ, "TMPDIR": scratch},
        )
        try:
            deadline = time.monotonic() + READY_S
            while not _engine_runs(tmp_path):
                assert time.monotonic() < deadline
                assert driver.poll() is None
                time.sleep(0.2)
        finally:
            driver.kill()
            driver.wait()
        deadline = time.monotonic() + 120
        while left := left_behind():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)


def _engine_runs(work: Path) -> bool:
    return any(
        entry.pid
        for table in work.glob("serving-*/table.json")
        for entry in read_table(table).workers
    )
