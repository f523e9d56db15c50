import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from expert_trainer import runtime
from expert_trainer.crew import Node
from expert_trainer.errors import PoolError
from expert_trainer.runtime import NAMESPACE, ray_session

GUEST = """
import ray
from expert_trainer.runtime import ray_session
with ray_session():
    print(int(ray.cluster_resources()["CPU"]), ray.get_runtime_context().namespace)
assert not ray.is_initialized()
"""


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
def own_temp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go, and nobody else's; Ray's sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def test_a_private_session_stays_on_this_machine_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, own_temp: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = children()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with ray_session(cpus=1):
        assert list(own_temp.glob("introvert-*"))
        assert signal.getsignal(signal.SIGTERM) == on_sigterm, "ray.init takes it over"
        assert "OMP_NUM_THREADS" not in os.environ, "the driver's environment is its own"
        environment = ray.get(ray.remote(lambda: dict(os.environ)).remote())
        assert environment["OMP_NUM_THREADS"] == "1"
        assert ray.get_runtime_context().namespace == NAMESPACE
        with ray_session(cpus=8):
            assert ray.cluster_resources()["CPU"] == 1
        assert ray.is_initialized(), "an inner session ends nothing"
        mine = children() - before
        listening = {
            connection.laddr.ip
            for process in mine
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        address = ray.get_runtime_context().gcs_address
        guest = subprocess.run(
            [sys.executable, "-c", GUEST],
            env=os.environ | {"RAY_ADDRESS": address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            capture_output=True,
            text=True,
            check=True,
            timeout=240,
        )
        assert guest.stdout.split() == ["1", NAMESPACE]
        assert ray.get(ray.remote(lambda: 1).remote()) == 1, "a guest leaves the cluster running"
    assert not ray.is_initialized()
    assert children() == before
    assert not list(own_temp.glob("introvert-*"))
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening


def test_a_start_sweeps_what_dead_drivers_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "LONGEST_ROOT", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, alive, foreign = (tmp_path / f"introvert-{name}" for name in ("dead", "alive", "foreign"))
    for directory in (dead, alive, foreign):
        directory.mkdir()
        (directory / "session").touch()
    (dead / runtime.LOCK_FILE).touch()
    with (alive / runtime.LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with runtime._own_directory() as own, runtime._own_directory() as another:
            assert own != another
            assert {alive, foreign, Path(own), Path(another)} == set(tmp_path.iterdir())
    assert set(tmp_path.iterdir()) == {alive, foreign}


def test_a_cluster_whose_nodes_are_yet_to_come_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    head, worker = Node("head", "h", "h:1", 0, 0), Node("worker", "w", "w:1", 4, 0)
    looks = iter([[head], [head], [head, worker]])
    monkeypatch.setattr(runtime, "alive_nodes", lambda: next(looks))
    monkeypatch.setattr(runtime, "POLL_S", 0.01)
    assert runtime.await_nodes() == [head, worker]
    assert caplog.text.count("waiting for a node") == 1


def test_an_address_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(PoolError, match=r"RAY_ADDRESS=127\.0\.0\.1:1"), ray_session():
        pass


def test_a_start_that_was_too_slow_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tells it by an exception of no class of its own."""
    slow: list[str] = []

    def too_slow(**options: object) -> None:
        slow.append(str(options["address"]))
        if len(slow) < runtime.START_TRIES:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", too_slow)
    runtime._start_patiently("unused", 1, children())
    assert len(slow) == runtime.START_TRIES
    slow[:] = []
    monkeypatch.setattr(runtime, "START_TRIES", 1)
    monkeypatch.setattr(runtime, "_start", raising)
    with pytest.raises(PoolError, match=r"tried 1 times; see that .* not overloaded"):
        runtime._start_patiently("unused", 1, children())


def raising(*_: object) -> None:
    raise runtime._SlowStartError("The current node timed out during startup.")
