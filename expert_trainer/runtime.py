"""Connecting to Ray: an existing cluster, or a private one that leaves nothing behind.

Knows nothing of what runs on the cluster.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from expert_trainer.crew import Node
from expert_trainer.errors import PoolError
from expert_trainer.reaper import reaper

logger = logging.getLogger(__name__)

NAMESPACE = "introvert"
OBJECT_STORE_BYTES = 256 * 1024 * 1024
"""Rows, adapters and tokens never travel through the store; results of a few kilobytes do."""
SHUTDOWN_S = 10.0
CONNECT_S = 5.0
POLL_S = 1.0
START_TRIES = 3
"""Of a private Ray, which gives up on its own processes after half a minute."""
SAY_S = 30.0
"""Seconds after which whoever waits for a node is told again."""
DIRECTORY_PREFIX = "introvert-"
LOCK_FILE = "driver.lock"
"""In a private cluster's directory, locked by its driver as long as that lives."""
LONGEST_ROOT = 30
"""Characters: Ray's sockets lie 75 deeper, and a socket's path ends at 107."""
DRIVER_ENVIRONMENT = {"RAY_enable_metrics_collection": "0"}
"""For the driver. Ray counts the states of tasks by name, and here each has a name of its own: the
counters of thousands of experts would take up ever more memory and time."""
RAY_ENVIRONMENT = DRIVER_ENVIRONMENT | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""For Ray's processes, which inherit it. An actor with more cores raises its own thread count; the
setting about Windows and macOS makes Ray listen on the loopback address alone, as it does there.
Ray would run its workers at niceness 15, and so training and engines behind everything else."""


@contextmanager
def ray_session(*, cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray inside the context.

    With `RAY_ADDRESS` set, to that cluster, and disconnect at the end. Otherwise to a private one
    on this machine, reachable from this machine alone, and end all its processes at the end; if
    this process is killed, they end within seconds. Inside another session this does nothing.

    Args:
        cpus: cores that a private cluster offers; default: those this process may use.

    Raises:
        PoolError: the cluster at `RAY_ADDRESS` cannot be reached, or Ray does not start.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _connect(address)
        try:
            yield
        finally:
            ray.shutdown()
        return
    before = _children()
    with _own_directory() as directory:
        try:
            with _environment(RAY_ENVIRONMENT), _on_loopback():
                _start_patiently(directory, cpus or len(os.sched_getaffinity(0)), before)
            with reaper(directory, _children() - before):
                yield
        finally:
            ray.shutdown()
            _end(_children() - before)


def alive_nodes() -> list[Node]:
    """The nodes of the Ray cluster that are alive, inside a session."""
    import ray

    return [
        Node(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def await_nodes() -> list[Node]:
    """The alive nodes, once any of them has a core: in a cluster that starts, they come late."""
    said_at = float("-inf")
    while True:
        nodes = alive_nodes()
        if any(node.cpus for node in nodes):
            return nodes
        if time.monotonic() - said_at >= SAY_S:
            said_at = time.monotonic()
            logger.warning("waiting for a node of the Ray cluster that offers cores")
        time.sleep(POLL_S)


def free_resources() -> str:
    """What of the Ray cluster nobody holds, in words."""
    import ray

    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return f"{free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} cores"


def _connect(address: str) -> None:
    import ray

    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit() and "/" not in host:  # Ray itself would try for 40 seconds
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        with _own_sigterm(), _environment(DRIVER_ENVIRONMENT):
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise PoolError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({_first_line(error)}); "
            "start it, or unset RAY_ADDRESS to use this machine alone"
        ) from None


class _SlowStartError(Exception):
    """Ray gave its own processes up, for which it waits half a minute and no longer."""


def _start_patiently(directory: str, cpus: int, before: set[psutil.Process]) -> None:
    """Start a private Ray, again where it was too slow: a busy machine may take longer at first."""
    import ray

    for tries_left in reversed(range(START_TRIES)):
        try:
            _start(directory, cpus)
            return
        except _SlowStartError as error:
            ray.shutdown()
            _end(_children() - before)
            if not tries_left:
                raise PoolError(
                    f"Ray does not start on this machine: {_first_line(error)}; it was tried "
                    f"{START_TRIES} times; see that the machine is not overloaded"
                ) from None
            logger.warning("Ray's processes were too slow; they are started again")


def _start(directory: str, cpus: int) -> None:
    import ray

    try:
        with _own_sigterm():
            ray.init(
                address="local",
                num_cpus=cpus,
                namespace=NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=directory,
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise PoolError(
            f"Ray does not start on this machine: {_first_line(error)}; "
            "see that there is memory and room on the temporary disk"
        ) from None
    except Exception as error:
        if type(error) is not Exception:  # what Ray raises when its processes are too slow
            raise
        raise _SlowStartError(str(error)) from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """`ray.init` makes SIGTERM an exit with code 15 for good; give it back to whoever had it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        signal.signal(signal.SIGTERM, mine)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, mine)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Ray reads its settings at its start, and its processes inherit the environment of then."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _on_loopback() -> Iterator[None]:
    """The environment's setting for this process, where ray may have been imported before it."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _own_directory() -> Iterator[str]:
    """A directory for a private cluster; those of dead drivers are removed on the way."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > LONGEST_ROOT:
        root = Path("/tmp")
    _sweep(root)
    directory = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=root))
    unlocked = directory / f".{LOCK_FILE}"
    with unlocked.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unlocked.rename(directory / LOCK_FILE)  # nobody ever sees it unlocked while this lives
        try:
            yield str(directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove the directories of drivers that died without the chance to do it."""
    for path in root.glob(f"{DIRECTORY_PREFIX}*/{LOCK_FILE}"):
        with suppress(OSError), path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    """See Ray's processes out: of a start that was broken off, nobody else has told them to end."""
    _, alive = psutil.wait_procs(_told(processes, signal.SIGTERM), timeout=SHUTDOWN_S)
    psutil.wait_procs(_told(alive, signal.SIGKILL), timeout=SHUTDOWN_S)


def _told(processes: Iterable[psutil.Process], number: signal.Signals) -> list[psutil.Process]:
    """The processes, each sent a signal."""
    told = list(processes)
    for process in told:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return told


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
