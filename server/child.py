"""A child process of the driver's: started, asked for its one line, ended with its standard input.

Knows nothing of what any of them does.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.errors import ControlFailedError

log = logging.getLogger(__name__)

END_S = 60.0
"""Longest that an ending child may take before it is killed."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0
"""Seconds of life after which a death is not held against the next start."""


class Child:
    """A process that ends when its standard input closes, and may tell one line of JSON."""

    def __init__(self, module: str, log_file: Path) -> None:
        """Describe it; nothing is started yet."""
        self._module = module
        self._log_file = log_file
        self._process: subprocess.Popen[str] | None = None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self._process.pid if self._process and self.alive else None

    def start(
        self, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it, in the place of one that has died."""
        self.kill()
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the driver, which ends it in order
            )

    def fact(self) -> dict[str, Any]:
        """What it tells of its start, waited for until it does or ends.

        Raises:
            ControlFailedError: that it cannot start; with its own reason.
        """
        assert self._process, "it was started"
        assert self._process.stdout, "it was asked for"
        fact: dict[str, Any] = {}
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print other lines
                fact = json.loads(line)
                break
        if not fact or "error" in fact:
            self.stop()
            reason = fact.get("error") or f"the control plane ended; see {self._log_file}"
            raise ControlFailedError(str(reason), int(fact.get("exit_code", 1)))
        return fact

    def stop(self) -> None:
        """Have it end in order; kill it if it does not."""
        if self._process is None:
            return
        assert self._process.stdin, "it was asked for"
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            log.error("%s does not end; it is killed", self._module)
        self.kill()

    def kill(self) -> None:
        """End it at once, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
