"""One engine process, guarded: started on a free port, watched, ended.

Knows nothing of what the engine serves, nor of starting it again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path

from server.engine import EngineCommand
from server.guard import DEFAULT_GRACE_S, OUTER_MARGIN_S, descendants

CommandFor = Callable[[str, int], EngineCommand]
"""Host and port to the command of an engine that listens there."""

PORTS = range(20_000, 32_000)
"""Below Linux's ephemeral ports, so that no outgoing connection takes one before the engine."""
STOP_TIMEOUT_S = DEFAULT_GRACE_S + OUTER_MARGIN_S + 5.0
TAIL_LINES = 15
TAIL_BYTES = 16_384
_TAKEN = {errno.EADDRINUSE, errno.EACCES}


class EngineProcess:
    """A started engine and its log."""

    def __init__(
        self, process: Process, url: str, *, pid_file: Path, log: Path, log_start: int
    ) -> None:
        """Use `start`."""
        self._process = process
        self._pid_file = pid_file
        self._log = log
        self._log_start = log_start
        self.url = url
        """Root of the engine's HTTP API."""

    @classmethod
    async def start(cls, command_for: CommandFor, *, host: str, log: Path) -> EngineProcess:
        """Start an engine under a guard on a free port of `host`; append its output to `log`.

        It ends with this process at the latest, since the guard watches a pipe held here.
        """
        port = free_port(host)
        command = command_for(host, port)
        log.parent.mkdir(parents=True, exist_ok=True)
        # named by the port too, for two servers may share a log directory
        pid_file = log.with_name(f"{log.stem}-{port}.pid")
        pid_file.unlink(missing_ok=True)
        guard = [sys.executable, "-m", "server.guard", "--pid-file", str(pid_file)]
        if command.cores:
            guard += ["--cores", ",".join(map(str, command.cores))]
        with log.open("ab") as output:
            log_start = output.tell()
            process = await asyncio.create_subprocess_exec(
                *guard,
                "--",
                *command.argv,
                env={**os.environ, **command.env},
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        bracketed = f"[{host}]" if ":" in host else host
        return cls(
            process,
            f"http://{bracketed}:{port}",
            pid_file=pid_file,
            log=log,
            log_start=log_start,
        )

    @property
    def pid(self) -> int | None:
        """Process id of the engine itself; none before it runs and after it has ended."""
        try:
            return int(self._pid_file.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None

    def cpu_seconds(self) -> float:
        """CPU time, in seconds, that the engine's living processes and its guard have used."""
        guard = self._process.pid
        ticks = sum(_cpu_ticks(pid) for pid in (guard, *descendants(guard)))
        return ticks / os.sysconf("SC_CLK_TCK")

    async def ended(self) -> str:
        """Wait until the engine and all its children are gone; say how it ended."""
        code = await self._process.wait()
        if code < 0:
            return f"its guard was killed by signal {-code}"
        return f"killed by signal {code - 128}" if code > 128 else f"exit code {code}"

    async def stop(self) -> None:
        """End the engine and all its children; return when they are gone."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()  # its inner half ends the tree
            await self._process.wait()

    def last_words(self) -> str:
        """The last lines that this engine wrote to its log."""
        with self._log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return "\n".join(lines[-TAIL_LINES:])


def _cpu_ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0  # it ended while the others were being read
    return sum(map(int, stat.rpartition(")")[2].split()[11:13]))


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on; where the search begins differs by process."""
    first = os.getpid() * 31 % len(PORTS)
    for offset in range(len(PORTS)):
        port = PORTS[(first + offset) % len(PORTS)]
        if is_free(host, port):
            return port
    raise OSError(f"no free port on {host} between {PORTS.start} and {PORTS.stop}")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on `host` and `port` now.

    Raises:
        OSError: `host` is no address of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise
        return True
