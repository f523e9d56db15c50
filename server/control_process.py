"""The control plane as the driver sees it: child processes that are started again when they die.

Two of them, since whoever is connected to a Ray head dies with it, and a private cluster dies with
whoever has started it: one holds Ray up, where the run has a Ray of its own; the other is the
control process, which finds its workers again in a Ray that goes on. Both end when their standard
input closes, so they cannot outlive the driver.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from configs.schema import RunConfig
from expert_trainer.runtime import RAY_ENVIRONMENT
from server.child import FIRST_PAUSE_S, LONGEST_PAUSE_S, STEADY_S, Child
from server.errors import ControlFailedError

log = logging.getLogger(__name__)

SESSION = "server.control.session"
CONTROL = "server.control"


class ControlProcess:
    """The control plane, from `start` to `stop`."""

    def __init__(
        self, config: RunConfig, *, run_dir: Path, log_dir: Path, offline: bool = False
    ) -> None:
        """Describe it; nothing is started yet.

        Args:
            config: the run.
            run_dir: where it writes the table and what it remembers; the config is written there.
            log_dir: both processes' standard errors are appended to files here.
            offline: whether the engines are a batch's.
        """
        self._offline = offline
        self._config = config
        self._run_dir = run_dir
        self._session = Child(SESSION, log_dir / "ray.log")
        self._control = Child(CONTROL, log_dir / "control.log")
        self._address = ""
        # Ray's default is a token in a file of the user's, which the next program may replace
        self._token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._failures = 0
        self._started = 0.0
        self._pause_until = 0.0

    @property
    def pid(self) -> int | None:
        """Process id of the control process, if it runs."""
        return self._control.pid

    def start(self) -> None:
        """Start what is not running; return when the table is written.

        Raises:
            ControlFailedError: it cannot be; the text and the exit code are its own reason's.
        """
        environment = dict(os.environ)
        if not os.environ.get("RAY_ADDRESS"):
            environment |= RAY_ENVIRONMENT | self._token
            if not self._session.alive:
                self._control.kill()  # it has lost its Ray, and could not even take leave of it
                self._session.start(environment=environment)
                self._address = str(self._session.fact()["address"])
            environment["RAY_ADDRESS"] = self._address
        config_file = self._run_dir / "control-config.json"
        config_file.write_text(self._config.model_dump_json(), encoding="utf-8")
        files = ["--config", str(config_file), "--run-dir", str(self._run_dir)]
        if self._offline:
            files.append("--offline")
        self._control.start(files, environment)
        self._control.fact()
        self._started = time.monotonic()

    def revive(self, ended: Callable[[], bool]) -> None:
        """Start again what has died, after a pause that grows with each failure in a row.

        Args:
            ended: whether the driver ends, so that nothing is to be started.
        """
        if self._control.alive and (self._session.alive or os.environ.get("RAY_ADDRESS")):
            return
        now = time.monotonic()
        if now < self._pause_until or ended():
            return
        if now - self._started > STEADY_S:
            self._failures = 0
        log.warning("the control plane has ended; starting it")
        try:
            self.start()
        except ControlFailedError as error:
            log.error("%s", error)
        self._failures += 1
        pause = min(FIRST_PAUSE_S * 2.0**self._failures, LONGEST_PAUSE_S)
        self._pause_until = time.monotonic() + pause

    def stop(self) -> None:
        """End the control plane, workers included; return when both processes are gone."""
        self._control.stop()
        self._session.stop()
