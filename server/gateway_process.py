"""The gateway as the driver sees it: a child process that is started again when it dies.

It ends when its standard input closes, so it cannot outlive the driver. Of what the gateway does
this module knows only how it tells its state.
"""

from __future__ import annotations

import json
import logging
import select
import subprocess
import sys
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

from configs.schema import RunConfig
from server.errors import GatewayFailedError

log = logging.getLogger(__name__)

MODULE = "server.gateway"
START_TIMEOUT_S = 120.0
END_MARGIN_S = 5.0
"""Beyond the drain time, before an ending gateway is killed."""
RESTART_PAUSE_S = 1.0
ANSWER_TIMEOUT_S = 5.0


class GatewayProcess:
    """One gateway, from `start` to `stop`."""

    def __init__(
        self, config: RunConfig, *, config_file: Path, table_file: Path, log_file: Path
    ) -> None:
        """Describe the gateway; nothing is started yet.

        Args:
            config: the run; its `gateway` section says where to listen.
            config_file: the config is written here for the process to read.
            table_file: the routing table that it watches.
            log_file: its standard error is appended here.
        """
        self._config = config
        self._config_file = config_file
        self._table_file = table_file
        self._log_file = log_file
        self._process: subprocess.Popen[str] | None = None
        self._spawned = 0.0
        self.url = ""
        """Where it answers, once `start` has returned."""

    def start(self) -> None:
        """Start the process; return when it listens.

        Raises:
            GatewayFailedError: it ended or said nothing in time; the text is its own reason.
        """
        process = self._spawn()
        assert process.stdout, "it was asked for"
        readable, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        line = process.stdout.readline() if readable else ""
        try:
            fact = json.loads(line or "{}")
        except json.JSONDecodeError:
            fact = {}
        if "url" not in fact:
            self.stop()
            reason = fact.get("error") or f"it said nothing; see {self._log_file}"
            raise GatewayFailedError(f"the gateway does not start: {reason}")
        self.url = fact["url"]
        self._keep_port()

    def waits_for(self, version: int) -> str:
        """What it needs before it serves by a table as new as `version`; empty where nothing.

        Raises:
            GatewayFailedError: it cannot load its router.
        """
        # a proxy that the environment names is not for this machine's own processes
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/admin/status", timeout=ANSWER_TIMEOUT_S) as answer:
                status = json.load(answer)
        except (OSError, HTTPException) as error:
            return f"the gateway does not answer ({error})"
        if status["table"] is None or status["table"]["version"] < version:
            return "the gateway has not read the newest routing table"
        if status["router"]["state"] == "failed":
            raise GatewayFailedError(f"the gateway does not start: {status['router']['detail']}")
        return str(status["router"]["detail"])

    def revive(self) -> None:
        """Start the process again if it has died; its address stays the same."""
        if self._process is None or self._process.poll() is None:
            return
        if time.monotonic() - self._spawned >= RESTART_PAUSE_S:
            log.warning("the gateway ended with code %d; starting it", self._process.returncode)
            self._close_pipes(self._process)
            self._spawn()

    def stop(self) -> None:
        """Have the process drain and end; kill it if it does not."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin, "it was asked for"
        process.stdin.close()
        try:
            process.wait(self._config.gateway.drain_timeout_s + END_MARGIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._close_pipes(process)

    def _spawn(self) -> subprocess.Popen[str]:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        self._config_file.write_text(self._config.model_dump_json(), encoding="utf-8")
        files = ["--config", str(self._config_file), "--table", str(self._table_file)]
        with self._log_file.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, *files],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for the driver, which ends it in order
            )
        self._spawned = time.monotonic()
        return self._process

    def _keep_port(self) -> None:
        """Have a later start listen where this one does, also if any port was right at first."""
        port = int(self.url.rstrip("/").rpartition(":")[2])
        gateway = self._config.gateway.model_copy(update={"port": port})
        self._config = self._config.model_copy(update={"gateway": gateway})

    @staticmethod
    def _close_pipes(process: subprocess.Popen[str]) -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
