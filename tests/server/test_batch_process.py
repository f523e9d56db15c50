"""The driver's side of the batches' runner, over the real one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from configs.schema import RunConfig
from server import batch_process as module
from server.batch_process import BatchProcess


@pytest.fixture
def batches(tmp_path: Path) -> Iterator[BatchProcess]:
    config = RunConfig.model_validate(
        {
            "bundle": {"path": str(tmp_path / "bundle"), "scratch_dir": str(tmp_path / "scratch")},
            "base": {"model": "base"},
            "data": {"train": ["x.jsonl"]},
        }
    )
    made = BatchProcess(
        config, run_dir=tmp_path, log_dir=tmp_path / "logs", url="http://127.0.0.1:9"
    )
    made.start()
    try:
        yield made
    finally:
        made.stop()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log(tmp_path: Path) -> str:
    return (tmp_path / "logs" / "batches.log").read_text()


def test_it_runs_until_it_is_stopped(batches: BatchProcess, tmp_path: Path) -> None:
    until(lambda: "running the batches in" in log(tmp_path))
    assert batches.pid is not None
    process = psutil.Process(batches.pid)
    batches.revive()
    assert batches.pid == process.pid
    batches.stop()
    assert not process.is_running()
    assert "standard input closed" in log(tmp_path)
    batches.stop()


def test_one_that_died_is_started_again(
    batches: BatchProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    until(lambda: "running the batches in" in log(tmp_path))
    assert batches.pid is not None
    first = psutil.Process(batches.pid)
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: batches.pid is None)
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 3600.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 3600.0)
    batches.revive()
    assert batches.pid is None, "not at once"
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.0)
    batches.revive()
    assert batches.pid not in (None, first.pid)
    until(lambda: log(tmp_path).count("running the batches in") == 2)
