"""Settings and servers that every test shares."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The machine is shared and slow at times: time is never what a property test is about.
settings.register_profile(
    "introvert", deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile("introvert")


@pytest.fixture(scope="session")
def start_ftp() -> Iterator[Callable[..., str]]:
    """`serve_ftp` for the whole run."""
    with ExitStack() as stack:
        yield lambda directory, **options: stack.enter_context(serve_ftp(directory, **options))


@contextmanager
def serve_ftp(directory: Path, *, idle_timeout_s: float = 300) -> Iterator[str]:
    """An FTP server in a process of its own; its URL, user and password included."""
    script = Path(__file__).with_name("ftp_server.py")
    with subprocess.Popen(
        [sys.executable, str(script), str(directory), str(idle_timeout_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={},  # nor is it one of the processes that a test looks for at its end
    ) as process:
        assert process.stdout is not None
        yield f"ftp://introvert:open-sesame@127.0.0.1:{process.stdout.readline().strip()}"
        process.communicate()


@pytest.fixture(scope="session")
def ftp() -> Callable[..., AbstractContextManager[str]]:
    """A context in which an FTP server shows a directory: `with ftp(directory) as url`."""
    return serve_ftp


@pytest.fixture(scope="session")
def ftp_server(
    start_ftp: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """An FTP server for the whole run: its URL and the directory that it shows."""
    directory = tmp_path_factory.mktemp("ftp")
    return start_ftp(directory), directory


@pytest.fixture
def ftp_url(ftp_server: tuple[str, Path], tmp_path: Path) -> str:
    """A directory of the test's own behind an FTP URL; it is not there yet."""
    return f"{ftp_server[0]}/{tmp_path.parent.name}/{tmp_path.name}"
