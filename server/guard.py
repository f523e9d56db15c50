"""A parent for one process tree that never outlives whoever asked for it.

    python -m server.guard [--grace SECONDS] [--cores 0,1] [--pid-file FILE] -- COMMAND…

Two processes, outer and inner, each a child subreaper, so that no descendant escapes by forking or
starting a session of its own:

    worker ──(pipe)── outer ── inner ── COMMAND ── its children

- standard input ends (the worker is gone, or asks for it), or SIGTERM comes: COMMAND gets SIGTERM,
  and after the grace everything left gets SIGKILL;
- COMMAND ends: everything left gets SIGKILL; the exit code is COMMAND's (128 + n for signal n);
- the outer one is killed: the inner one learns it from the kernel and ends the tree;
- the inner one is killed: the outer one inherits the tree and ends it.

The command's temporary files go to a directory of their own, removed at the end, as is the file
with COMMAND's process id. Standard library only, since it must start in milliseconds. Knows
nothing of engines.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
DEFAULT_GRACE_S = 5.0
OUTER_MARGIN_S = 2.0
"""How much longer the outer process waits, so that the inner one does the ending if it can."""
STDIN = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command as guarded; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m server.guard")
    parser.add_argument("--grace", type=float, default=DEFAULT_GRACE_S)
    parser.add_argument("--cores", default="", help="cores to confine the command to: 0,1")
    parser.add_argument("--pid-file", type=Path, help="where to write the command's process id")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args(argv)
    scratch = Path(tempfile.mkdtemp(prefix="guard-"))
    outer = os.getpid()
    news = _become_guard()
    inner = os.fork()
    if inner == 0:
        news = _become_guard()
        _die_with_parent(outer, signal.SIGTERM)
        child = _spawn(arguments.command, arguments.cores, scratch)
        if arguments.pid_file:
            _write_pid(arguments.pid_file, child)
        code = _watch(child, news, arguments.grace)
        _tidy(scratch, arguments.pid_file)
        os._exit(code)
    try:
        return _watch(inner, news, arguments.grace + OUTER_MARGIN_S)
    finally:
        _tidy(scratch, arguments.pid_file)


def _write_pid(path: Path, pid: int) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(str(pid), encoding="ascii")
    temporary.replace(path)


def _tidy(scratch: Path, pid_file: Path | None) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    if pid_file:
        pid_file.unlink(missing_ok=True)


def _become_guard() -> int:
    """Lead a session, adopt orphans; return a pipe that carries the numbers of signals."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: None)
    return read


def _spawn(command: Sequence[str], cores: str, scratch: Path) -> int:
    guard = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        _die_with_parent(guard, signal.SIGKILL)
        if cores:
            os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
        os.environ["TMPDIR"] = str(scratch)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, STDIN)
        os.execvp(command[0], list(command))
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _watch(child: int, news: int, grace_s: float) -> int:
    """Wait until the child ends or is to be ended; leave no descendant; return its exit code."""
    deadline: float | None = None
    watched = [STDIN, news]
    status = _reap(child)
    while status is None:
        remaining = None if deadline is None else max(deadline - time.monotonic(), 0)
        readable, _, _ = select.select(watched, [], [], remaining)
        asked = STDIN in readable and not os.read(STDIN, 4096)
        if news in readable:
            asked = bool(set(os.read(news, 4096)) - {signal.SIGCHLD}) or asked
        status = _reap(child)
        if status is None and asked and deadline is None:
            watched = [news]
            deadline = time.monotonic() + grace_s
            os.kill(child, signal.SIGTERM)
        if deadline is not None and time.monotonic() >= deadline:
            break
    ended = _kill_descendants(child)
    code = os.waitstatus_to_exitcode(status if status is not None else ended)
    return code if code >= 0 else 128 - code


def _reap(child: int) -> int | None:
    """Collect all that have ended; the wait status of `child` if it is among them."""
    status = None
    while True:
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            status = ended


def _kill_descendants(child: int) -> int:
    """SIGKILL what is left, again and again until nothing is; the wait status of `child`.

    One round is not enough: a process may fork between being listed and being killed. Its orphans
    come to this process, so the last round finds them.
    """
    child_status = 0
    while left := descendants(os.getpid()):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            break
        if pid == child:
            child_status = status
    return child_status


def descendants(root: int) -> list[int]:
    """Processes below `root` that have not ended, and its own ended children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = _parent_of(entry)
            if parent is not None:
                children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    pending = [root]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def _parent_of(entry: Path) -> int | None:
    try:
        stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None  # it ended while the directory was being read
    return int(stat.rpartition(")")[2].split()[1])


def _die_with_parent(parent: int, number: int) -> None:
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the kernel was told
        os.kill(os.getpid(), number)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


if __name__ == "__main__":
    sys.exit(main())
