"""The gateway processes as the driver sees them: children that are started again when they die.

They share one port. The driver has a listening socket for each and hands it down, so that whoever
connects while a process is dead waits for the next one and is refused by nobody. They end when
their standard inputs close, so they cannot outlive the driver. Of what a gateway does this module
knows only how it tells its state.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

from configs.schema import RunConfig
from server.admin_key import AdminKey
from server.errors import GatewayFailedError
from server.gateway.seat import COUNT_FILES
from server.gateway.shared import clear_row
from server.gateway_reports import gather_reports
from server.sockets import listen, url_of
from server.table import TABLE_FILE

log = logging.getLogger(__name__)

MODULE = "server.gateway"
START_TIMEOUT_S = 120.0
END_MARGIN_S = 5.0
"""Beyond the drain time, before an ending gateway is killed."""
RESTART_PAUSE_S = 1.0
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
"""Unless it says otherwise already. The products of a router's students are so small that several
threads lose more by waiting for each other: 32 texts took 28 ms at P99 beside busy processes, and
5 ms on one thread."""


class GatewayProcesses:
    """All gateway processes of an endpoint, from `start` to `stop`."""

    def __init__(self, config: RunConfig, *, run_dir: Path, log_dir: Path) -> None:
        """Describe them; nothing is started yet.

        Args:
            config: the run; its `gateway` section says where to listen, and how many there are.
            run_dir: where the routing table lies; what the processes share comes beside it.
            log_dir: each one's standard error is appended to a file there.
        """
        self._config = config
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._sockets: list[socket.socket] = []
        self._children: list[_Child] = []
        self._admin_key = AdminKey(config.gateway)
        self.url = ""
        """Where they answer, once `start` has returned."""

    def start(self) -> None:
        """Start the processes; return when all of them listen.

        Raises:
            PortTakenError: another process listens on the port.
            ServingConfigError: the address cannot be listened on.
            GatewayFailedError: one ended or said nothing in time; the text is its own reason.
        """
        gateway = self._config.gateway
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        config_file = self._run_dir / "config.json"
        config_file.write_text(self._config.model_dump_json(), encoding="utf-8")
        self._sockets = listen(gateway.host, gateway.port, gateway.processes)
        try:
            self._admin_key.publish(self._sockets[0].getsockname()[1])
            self._children = [
                self._child(number, config_file) for number in range(len(self._sockets))
            ]
            for child in self._children:
                child.spawn()
            deadline = time.monotonic() + START_TIMEOUT_S
            for child in self._children:
                child.await_start(deadline)
        except BaseException:
            self.stop()
            raise
        self.url = url_of(gateway.host, self._sockets[0])

    def waits_for(self, version: int) -> str:
        """What they need before all serve by a table as new as `version`; empty where nothing.

        Raises:
            GatewayFailedError: one cannot load its router.
        """
        reports = asyncio.run(gather_reports(self._run_dir))
        silent = set(range(len(self._children))) - {report.process for report in reports}
        if silent:
            return f"gateway process {min(silent)} does not answer"
        for report in reports:
            if report.table_version < version:
                return f"gateway process {report.process} has not read the newest routing table"
            state = report.routers.get(report.bundle, "")
            if state.startswith("failed"):
                raise GatewayFailedError(
                    f"the gateway does not start: {state.removeprefix('failed: ')}"
                )
            if state != "ready":
                return state.partition(": ")[2] or "the router is not loaded"
        return ""

    def revive(self) -> None:
        """Start again whichever process has died; the address stays the same."""
        for child in self._children:
            child.revive()

    def stop(self) -> None:
        """Have the processes drain and end; kill those that do not."""
        for listening in self._sockets:
            listening.close()  # or the kernel would go on taking connections that nobody answers
        self._sockets = []
        children, self._children = self._children, []
        for child in children:
            child.ask_to_end()
        deadline = time.monotonic() + self._config.gateway.drain_timeout_s + END_MARGIN_S
        for child in children:
            child.await_end(deadline)
        self._admin_key.withdraw()

    def _child(self, number: int, config_file: Path) -> _Child:
        descriptor = self._sockets[number].fileno()
        command = [sys.executable, "-m", MODULE, "--config", str(config_file)]
        command += ["--table", str(self._run_dir / TABLE_FILE), "--listen-fd", str(descriptor)]
        command += ["--number", str(number), "--processes", str(len(self._sockets))]
        if self._admin_key.made_sha256:
            command += ["--admin-sha256", self._admin_key.made_sha256]
        # one process: the name that its log has always had
        name = "gateway.log" if len(self._sockets) == 1 else f"gateway-{number}.log"
        log_file = self._log_dir / name
        return _Child(number, command, descriptor, log_file=log_file, run_dir=self._run_dir)


class _Child:
    """One gateway process."""

    def __init__(
        self, number: int, command: list[str], descriptor: int, *, log_file: Path, run_dir: Path
    ) -> None:
        self._number = number
        self._command = command
        self._descriptor = descriptor
        self._log_file = log_file
        self._run_dir = run_dir
        self._process: subprocess.Popen[str] | None = None
        self._spawned = 0.0

    def spawn(self, *, again: bool = False) -> None:
        """Start it; `again`: clients wait for it already."""
        with self._log_file.open("ab") as errors:
            self._process = subprocess.Popen(
                [*self._command, *(["--again"] if again else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                pass_fds=[self._descriptor],
                env=ENVIRONMENT | os.environ,
                start_new_session=True,  # Ctrl-C is for the driver, which ends it in order
            )
        self._spawned = time.monotonic()

    def await_start(self, deadline: float) -> None:
        """Return when it listens.

        Raises:
            GatewayFailedError: it ended or said nothing in time.
        """
        assert self._process, "it has been started"
        assert self._process.stdout, "it was asked for"
        patience = max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([self._process.stdout], [], [], patience)
        line = self._process.stdout.readline() if readable else ""
        try:
            fact = json.loads(line or "{}")
        except json.JSONDecodeError:
            fact = {}
        if "url" not in fact:
            reason = fact.get("error") or f"it said nothing; see {self._log_file}"
            raise GatewayFailedError(f"the gateway does not start: {reason}")

    def revive(self) -> None:
        """Start it again if it has died."""
        if self._process is None or self._process.poll() is None:
            return
        for name in COUNT_FILES:  # what it had in flight is gone with it
            if (file := self._run_dir / name).exists():
                clear_row(file, self._number)
        if time.monotonic() - self._spawned >= RESTART_PAUSE_S:
            log.warning(
                "gateway process %d ended with code %d; starting it",
                self._number,
                self._process.returncode,
            )
            self._close_pipes(self._process)
            self.spawn(again=True)

    def ask_to_end(self) -> None:
        """Close its standard input, upon which it drains."""
        if self._process is not None:
            assert self._process.stdin, "it was asked for"
            self._process.stdin.close()

    def await_end(self, deadline: float) -> None:
        """Return when it has ended; kill it at the deadline."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_pipes(self._process)

    @staticmethod
    def _close_pipes(process: subprocess.Popen[str]) -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
