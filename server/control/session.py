"""A process that owns a private Ray cluster: `python -m server.control.session`.

It prints one line of JSON, the address or why there is none, and does nothing but hold Ray up
until its standard input closes. Ray ends whoever is connected to a head that has died, and a
cluster with whoever has started it: so that is neither the driver, nor the control process, which
finds its workers again when it is started anew.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time

import psutil

from configs.errors import IntrovertError
from expert_trainer.runtime import ray_session
from server.process import STOP_TIMEOUT_S

logger = logging.getLogger("server.control.session")

WATCH_S = 0.5
HEAD = frozenset({"gcs_server", "raylet"})
"""Names of the processes without which there is no cluster."""


def main() -> int:
    """Hold a cluster until standard input closes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    os.environ.pop("RAY_ADDRESS", None)
    try:
        with ray_session():
            import ray

            _tell({"address": ray.get_runtime_context().gcs_address})
            _hold([p for p in psutil.Process().children(recursive=True) if p.name() in HEAD])
            _see_out()
    except IntrovertError as error:
        _tell({"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    return 0


def _hold(head: list[psutil.Process]) -> None:
    """Return when standard input closes; die at once when a part of the head has died.

    To take leave of Ray would wait for the dead part. What is left of it ends with this process.
    """
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], WATCH_S)
        if readable and not os.read(sys.stdin.fileno(), 4096):
            return
        for process in head:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                logger.error("Ray's head has died; the cluster ends")
                os.kill(os.getpid(), signal.SIGKILL)


def _see_out() -> None:
    """Let a control process end its actors before their Ray is gone, where the driver was killed
    and told both at once."""
    import ray

    deadline = time.monotonic() + STOP_TIMEOUT_S
    while ray.util.list_named_actors(all_namespaces=True) and time.monotonic() < deadline:
        time.sleep(WATCH_S)


def _tell(fact: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(fact) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
