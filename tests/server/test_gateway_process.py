"""The driver's side of the gateway, over the real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.schema import RunConfig
from server import gateway_process as module
from server.errors import GatewayFailedError
from server.gateway_process import GatewayProcess
from server.table import RoutingTable, write_table

TABLE = RoutingTable(
    version=1, bundle="0123456789ab", base_name="base", max_model_len=None, workers=[], experts=[]
)


def make(tmp_path: Path, **gateway: Any) -> GatewayProcess:
    config = RunConfig.model_validate(
        {
            "bundle": {"path": str(tmp_path / "bundle")},
            "base": {"model": "base"},
            "data": {"train": ["x.jsonl"]},
            "gateway": {"port": 0, "drain_timeout_s": 1, **gateway},
        }
    )
    table_file = tmp_path / "table.json"
    write_table(table_file, TABLE)
    return GatewayProcess(
        config,
        config_file=tmp_path / "config.json",
        table_file=table_file,
        log_file=tmp_path / "logs" / "gateway.log",
    )


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    made = make(tmp_path)
    made.start()
    yield made
    made.stop()


def child() -> psutil.Process:
    (found,) = (p for p in psutil.Process().children() if "server.gateway" in p.cmdline())
    return found


def health(url: str) -> int:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return int(response.status)
    except OSError:
        return 0


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_listens_when_started_and_is_gone_when_stopped(tmp_path: Path) -> None:
    gateway = make(tmp_path)
    gateway.start()
    process = child()
    assert health(gateway.url) == 200
    gateway.stop()
    assert not process.is_running()
    assert health(gateway.url) == 0
    gateway.stop()


def test_a_dead_gateway_is_revived_at_the_same_address(
    gateway: GatewayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESTART_PAUSE_S", 0.0)
    gateway.revive()
    first = child()
    first.kill()
    first.wait(5)
    gateway.revive()
    wait_until(lambda: health(gateway.url) == 200)
    assert child().pid != first.pid


def test_a_deaf_gateway_is_killed(gateway: GatewayProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "END_MARGIN_S", 0.0)
    process = child()
    os.kill(process.pid, signal.SIGSTOP)
    gateway.stop()
    assert not process.is_running()


def test_the_reason_of_a_failed_start_is_passed_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(GatewayFailedError, match=f"port {port} on 127.0.0.1 is taken"):
            make(tmp_path, port=port).start()
    assert not [p for p in psutil.Process().children() if "server.gateway" in p.cmdline()]


def test_the_process_reads_the_config_it_was_given(gateway: GatewayProcess, tmp_path: Path) -> None:
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["gateway"]["drain_timeout_s"] == 1


def test_it_tells_what_it_waits_for(gateway: GatewayProcess) -> None:
    assert "newest routing table" in gateway.waits_for(TABLE.version + 1)
    with pytest.raises(GatewayFailedError, match=r"router cannot be loaded: .*not published"):
        wait_until(lambda: gateway.waits_for(TABLE.version) == "never")
    child().kill()
    wait_until(lambda: "does not answer" in gateway.waits_for(TABLE.version))
