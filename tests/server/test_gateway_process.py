"""The driver's side of the gateway, over the real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.schema import RunConfig
from server import gateway_process as module
from server import gateway_reports
from server.admin_key import admin_key_file
from server.errors import GatewayFailedError, PortTakenError
from server.gateway_process import GatewayProcesses
from server.gateway_reports import gather_reports
from server.table import RoutingTable, write_table

TABLE = RoutingTable(
    version=1, bundle="0123456789ab", base_name="base", max_model_len=None, workers=[], experts=[]
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The admin key of a test lies in the test's own directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(tmp_path: Path, **gateway: Any) -> GatewayProcesses:
    config = RunConfig.model_validate(
        {
            "bundle": {"path": str(tmp_path / "bundle")},
            "base": {"model": "base"},
            "data": {"train": ["x.jsonl"]},
            "gateway": {"port": 0, "drain_timeout_s": 1, **gateway},
        }
    )
    write_table(tmp_path / "table.json", TABLE)
    return GatewayProcesses(config, run_dir=tmp_path, log_dir=tmp_path / "logs")


@contextlib.contextmanager
def started(tmp_path: Path, **gateway: Any) -> Iterator[GatewayProcesses]:
    made = make(tmp_path, **gateway)
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcesses]:
    with started(tmp_path) as made:
        yield made


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "server.gateway" in p.cmdline()]


def child() -> psutil.Process:
    return max(children(), key=psutil.Process.create_time)  # the newest


def health(url: str) -> int:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
            return int(response.status)
    except OSError:
        return 0


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_listens_when_started_and_is_gone_when_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in module.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    gateway = make(tmp_path)
    gateway.start()
    try:
        process = child()
        assert module.ENVIRONMENT.items() <= process.environ().items()
        assert health(gateway.url) == 200
    finally:
        gateway.stop()
    assert not process.is_running()
    assert health(gateway.url) == 0
    gateway.stop()


def test_a_dead_gateway_is_revived_at_the_same_address(
    gateway: GatewayProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESTART_PAUSE_S", 0.0)
    gateway.revive()
    first = child()
    first.kill()
    first.wait(60)
    gateway.revive()
    wait_until(lambda: health(gateway.url) == 200)
    assert child().pid != first.pid


def test_a_deaf_gateway_is_killed(
    gateway: GatewayProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END_MARGIN_S", 0.0)
    process = child()
    os.kill(process.pid, signal.SIGSTOP)
    gateway.stop()
    assert not process.is_running()


def test_the_reason_of_a_failed_start_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(GatewayFailedError, match=r"keys\.yaml cannot be read"):
        make(tmp_path, keys_file=str(tmp_path / "keys.yaml"), processes=2).start()
    assert not children()


def test_a_taken_port_is_told_however_many_processes_there_are(tmp_path: Path) -> None:
    # the other one shares its port, as a second endpoint would
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} on 127.0.0.1 is taken"):
            make(tmp_path, port=port, processes=2).start()
    assert not children()


def test_the_process_reads_the_config_it_was_given(
    gateway: GatewayProcesses, tmp_path: Path
) -> None:
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["gateway"]["drain_timeout_s"] == 1


def test_it_tells_what_it_waits_for(gateway: GatewayProcesses) -> None:
    assert "newest routing table" in gateway.waits_for(TABLE.version + 1)
    with pytest.raises(GatewayFailedError, match=r"router cannot be loaded: .*not published"):
        wait_until(lambda: gateway.waits_for(TABLE.version) == "never")
    child().kill()
    wait_until(lambda: "does not answer" in gateway.waits_for(TABLE.version))


def test_the_admin_key_lies_where_its_user_finds_it_for_as_long_as_it_is_good(
    tmp_path: Path,
) -> None:
    with started(tmp_path) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        file = admin_key_file(port)
        key = file.read_text().strip()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert key not in " ".join(child().cmdline())
        assert key not in (tmp_path / "config.json").read_text()
    assert not file.exists()


def test_a_configured_admin_key_is_written_nowhere(tmp_path: Path) -> None:
    with started(tmp_path, admin_key_sha256="ab" * 32) as gateway:
        assert not admin_key_file(int(gateway.url.rpartition(":")[2])).exists()


def reports(tmp_path: Path) -> dict[int, int]:
    """Process id by number, of the processes that answer."""
    return {r.process: r.pid for r in asyncio.run(gather_reports(tmp_path))}


def test_several_processes_are_one_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESTART_PAUSE_S", 0.0)
    with started(tmp_path, processes=2) as gateway:
        assert len(children()) == 2
        pids = reports(tmp_path)
        assert set(pids) == {0, 1}
        # each connection goes to one or the other; the sum is the same whichever is asked
        for _ in range(20):
            assert ask(gateway.url, "nobody") == 404
        wait_until(lambda: counted(gateway.url) == 20)
        for _ in range(6):
            assert counted(gateway.url) == 20
        psutil.Process(pids[1]).kill()
        wait_until(lambda: reports(tmp_path).keys() == {0})
        assert counted_at(tmp_path, 0) == 20, "what a dead process told is not taken back"
        assert gateway.waits_for(TABLE.version) == "gateway process 1 does not answer"
        gateway.revive()
        wait_until(lambda: reports(tmp_path).keys() == {0, 1})
        assert reports(tmp_path)[0] == pids[0]
        assert reports(tmp_path)[1] != pids[1]
        for _ in range(10):
            assert ask(gateway.url, "nobody") == 404
        wait_until(lambda: counted(gateway.url) == 30)
    assert not children()


def test_while_a_process_is_dead_nobody_is_refused(tmp_path: Path) -> None:
    with started(tmp_path, processes=2) as gateway:
        pids = reports(tmp_path)
        port = int(gateway.url.rpartition(":")[2])
        for pid in pids.values():
            process = psutil.Process(pid)
            process.kill()
            process.wait(60)
        with contextlib.ExitStack() as stack:
            waiting = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
                for _ in range(8)
            ]
            for connection in waiting:
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            wait_until(lambda: _revived(gateway, tmp_path))
            for connection in waiting:
                connection.settimeout(60)
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def _revived(gateway: GatewayProcesses, tmp_path: Path) -> bool:
    gateway.revive()
    return len(reports(tmp_path)) == 2


def ask(url: str, model: str) -> int:
    body = json.dumps({"model": model, "prompt": "x"}).encode()
    try:
        with urllib.request.urlopen(f"{url}/v1/completions", body, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def counted(url: str) -> float:
    """Refused requests, as the metrics say."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        return requests_in(response.read().decode())


def counted_at(tmp_path: Path, number: int) -> float:
    """The same, asked at one process."""
    socket_file = tmp_path / f"gateway-{number}.sock"
    _, body = asyncio.run(gateway_reports.ask(socket_file, "GET", "/metrics"))
    return requests_in(body.decode())


def requests_in(text: str) -> float:
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("introvert_gateway_requests_total{")
    )
