"""The batches' runner as the driver sees it: a child process that is started again when it dies."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from configs.schema import RunConfig
from server.child import FIRST_PAUSE_S, LONGEST_PAUSE_S, STEADY_S, Child

log = logging.getLogger(__name__)

RUNNER = "server.batch.runner"


class BatchProcess:
    """The runner, from `start` to `stop`. Nobody waits for it: a batch may."""

    def __init__(self, config: RunConfig, *, run_dir: Path, log_dir: Path, url: str) -> None:
        """Describe it; nothing is started yet.

        Args:
            config: the run.
            run_dir: where the engines' key lies; the config is written there.
            log_dir: its standard error is appended to a file there.
            url: root of the gateway's API, which it asks.
        """
        self._config = config
        self._run_dir = run_dir
        self._url = url
        self._child = Child(RUNNER, log_dir / "batches.log")
        self._failures = 0
        self._started = 0.0

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self._child.pid

    def start(self) -> None:
        """Start it; return at once."""
        config_file = self._run_dir / "batches-config.json"
        config_file.write_text(self._config.model_dump_json(), encoding="utf-8")
        files = ["--config", str(config_file), "--run-dir", str(self._run_dir)]
        self._started = time.monotonic()
        self._child.start([*files, "--url", self._url])

    def revive(self) -> None:
        """Start it again if it has died, after a pause that grows with each death in a row."""
        if self._child.alive:
            return
        lived = time.monotonic() - self._started
        if lived > STEADY_S:
            self._failures = 0
        if lived < min(FIRST_PAUSE_S * 2.0**self._failures, LONGEST_PAUSE_S):
            return
        self._failures += 1
        log.warning("the batches' runner has ended; starting it")
        self.start()

    def stop(self) -> None:
        """End it; what it had in hand is taken up by the next one."""
        self._child.stop()
