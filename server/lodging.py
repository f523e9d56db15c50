"""What a driver needs for the processes that it owns: a directory for the run, a key, a keeper.

Knows nothing of what the processes do.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from configs.schema import RunConfig
from server.table import ENGINE_KEY_FILE

log = logging.getLogger(__name__)

KEEP_S = 0.25
"""Seconds between two looks at the processes."""


def make_run_dir(config: RunConfig, stack: ExitStack, kind: str = "serving") -> Path:
    """A directory of this driver's own, with a new engine key in it; gone at the end."""
    run_dir = (config.bundle.scratch / f"{kind}-{os.getpid()}").resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    run_dir.chmod(0o700)  # the config in it may hold a URL's password
    stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
    _make_key(run_dir / ENGINE_KEY_FILE)
    return run_dir


def keep(stack: ExitStack, name: str, look: Callable[[], None], ending: threading.Event) -> None:
    """Have a thread look after some processes, until the end, which `ending` is set for."""

    def looking() -> None:
        while not ending.wait(KEEP_S):
            try:
                look()
            except OSError as error:  # a full disk, no process to be had: it may pass
                log.error("%s: %s", name, error)

    thread = threading.Thread(target=looking, name=name, daemon=True)
    thread.start()
    stack.callback(thread.join)
    stack.callback(ending.set)


def _make_key(path: Path) -> None:
    """Write a new secret to a file that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32))
