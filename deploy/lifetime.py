"""How a serving command waits for its end."""

from __future__ import annotations

import signal

from deploy.cli import Terminated


def until_stopped() -> None:
    """Return when Ctrl-C or SIGTERM asks for the end."""
    try:
        while True:
            signal.pause()
    except (KeyboardInterrupt, Terminated):
        return
