from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

TREE = Path(__file__).parent / "process_tree.py"


@dataclass
class Guarded:
    """A guarded process tree."""

    process: subprocess.Popen[bytes]
    main: int
    scratch: Path
    others: list[int]

    @property
    def inner(self) -> int:
        return psutil.Process(self.main).ppid()

    @property
    def tree(self) -> list[int]:
        return [self.main, *self.others]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def all_gone(pids: list[int], seconds: float = 60.0) -> bool:
    return wait_until(lambda: not any(alive(pid) for pid in pids), seconds)


Start = Callable[..., Guarded]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Guarded] = []
    processes: list[subprocess.Popen[bytes]] = []

    def _start(*options: str, grace: float | None = None, extra: tuple[str, ...] = ()) -> Guarded:
        if grace is None:  # whatever heeds SIGTERM may take its time
            grace = 0.5 if "deaf" in options else 30.0
        pidfile = tmp_path / f"pids-{len(started)}"
        command = [sys.executable, str(TREE), str(pidfile), *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "server.guard", "--grace", str(grace), *extra, "--", *command],
            stdin=subprocess.PIPE,
        )
        processes.append(process)
        assert wait_until(pidfile.exists)
        main, scratch, *others = pidfile.read_text().split()
        started.append(Guarded(process, int(main), Path(scratch), [int(pid) for pid in others]))
        return started[-1]

    try:
        yield _start
    finally:
        for process in processes:
            assert process.stdin
            process.stdin.close()
        for process in processes:
            process.wait(60)
        for pid in [pid for guarded in started for pid in guarded.tree]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_closed_standard_input_ends_the_whole_tree(start: Start) -> None:
    guarded = start()
    assert all(alive(pid) for pid in guarded.tree)
    assert len(guarded.others) == 2
    assert guarded.process.stdin
    guarded.process.stdin.close()
    assert guarded.process.wait(60) == 128 + signal.SIGTERM
    assert not any(alive(pid) for pid in guarded.tree)
    assert not guarded.scratch.exists()


def test_a_tree_deaf_to_sigterm_is_killed_after_the_grace(start: Start) -> None:
    guarded = start("deaf", grace=1.0)
    assert guarded.process.stdin
    began = time.monotonic()
    guarded.process.stdin.close()
    assert guarded.process.wait(60) == 128 + signal.SIGKILL
    assert time.monotonic() - began > 0.9
    assert not any(alive(pid) for pid in guarded.tree)


def test_what_the_command_leaves_behind_is_killed_and_its_code_passed_on(start: Start) -> None:
    guarded = start("deaf", "end", "7")
    assert guarded.process.wait(60) == 7
    assert not any(alive(pid) for pid in guarded.tree)
    assert not guarded.scratch.exists()


def test_the_commands_death_by_signal_takes_its_children_along(start: Start) -> None:
    guarded = start("deaf")
    os.kill(guarded.main, signal.SIGKILL)
    assert guarded.process.wait(60) == 128 + signal.SIGKILL
    assert not any(alive(pid) for pid in guarded.tree)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_guard_ends_the_tree(start: Start, number: signal.Signals) -> None:
    guarded = start()
    guarded.process.send_signal(number)
    assert guarded.process.wait(60) == 128 + signal.SIGTERM
    assert not any(alive(pid) for pid in guarded.tree)


@pytest.mark.parametrize("options", [(), ("deaf",)])
def test_sigkill_of_the_outer_guard_leaves_nothing(start: Start, options: tuple[str, ...]) -> None:
    guarded = start(*options)
    inner = guarded.inner
    guarded.process.kill()
    assert all_gone([inner, *guarded.tree])
    assert wait_until(lambda: not guarded.scratch.exists())


@pytest.mark.parametrize("options", [(), ("deaf",)])
def test_sigkill_of_the_inner_guard_leaves_nothing(start: Start, options: tuple[str, ...]) -> None:
    guarded = start(*options)
    os.kill(guarded.inner, signal.SIGKILL)
    assert guarded.process.wait(60) == 128 + signal.SIGKILL
    assert not any(alive(pid) for pid in guarded.tree)
    assert not guarded.scratch.exists()


def test_sigkill_of_whoever_started_it_leaves_nothing(tmp_path: Path) -> None:
    pidfile = tmp_path / "pids"
    script = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'server.guard', '--', *sys.argv[1:]],"
        " stdin=subprocess.PIPE)\n"
        "time.sleep(120)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, sys.executable, str(TREE), str(pidfile)]
    )
    try:
        assert wait_until(pidfile.exists)
        main, scratch, *others = pidfile.read_text().split()
    finally:
        parent.kill()
        parent.wait(60)
    assert all_gone([int(pid) for pid in (main, *others)])
    assert wait_until(lambda: not Path(scratch).exists())


def test_the_command_is_confined_to_its_cores(start: Start) -> None:
    core = sorted(os.sched_getaffinity(0))[-1]
    guarded = start(extra=("--cores", str(core)))
    assert os.sched_getaffinity(guarded.main) == {core}
    assert os.sched_getaffinity(guarded.others[0]) == {core}
    assert os.sched_getaffinity(guarded.process.pid) == os.sched_getaffinity(0)


def test_a_command_that_is_not_there_is_named() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "server.guard", "--", "no-such-command"],
        check=False,
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 127
    assert "no-such-command: No such file or directory" in result.stderr
