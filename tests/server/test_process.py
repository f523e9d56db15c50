from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from pathlib import Path

import pytest

from server.engine import EngineCommand
from server.process import PORTS, EngineProcess, free_port, is_free


def test_a_port_that_somebody_listens_on_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert not is_free("127.0.0.1", listening.getsockname()[1])


def test_a_host_of_another_machine_is_no_matter_of_ports() -> None:
    with pytest.raises(OSError, match="annot assign"):
        is_free("192.0.2.77", 20_001)


def test_the_next_free_port_is_found() -> None:
    for _ in range(20):
        first = free_port("127.0.0.1")
        assert first in PORTS
        # somebody else on this machine may be quicker
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", first)):
            assert free_port("127.0.0.1") not in (first, None)
            return
    pytest.fail("twenty ports in a row were taken by somebody else")


def says(text: str) -> EngineCommand:
    return EngineCommand((sys.executable, "-c", f"import sys; print({text!r}); sys.exit(3)"))


async def test_cpu_time_is_that_of_all_its_processes(tmp_path: Path) -> None:
    work = "import os; os.fork(); sum(range(10**7)); import time; time.sleep(60)"
    command = EngineCommand((sys.executable, "-c", work))
    process = await EngineProcess.start(
        lambda _host, _port: command, host="127.0.0.1", log=tmp_path / "log"
    )
    try:
        for _ in range(600):
            if process.cpu_seconds() >= 0.1:
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("it computes, and used no time")
    finally:
        await process.stop()
    assert process.cpu_seconds() == 0.0


async def test_the_last_words_are_those_of_this_start(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "worker-0.log"
    for word in ("first", "second"):
        process = await EngineProcess.start(
            lambda _h, _p, w=word: says(w), host="127.0.0.1", log=log
        )  # type: ignore[misc]
        assert await process.ended() == "exit code 3"
        assert process.last_words() == word
        assert process.pid is None
        await process.stop()
    assert log.read_text().split() == ["first", "second"]
    assert [path.name for path in log.parent.iterdir()] == ["worker-0.log"]
