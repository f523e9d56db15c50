"""The control process: `python -m server.control --config FILE --run-dir DIR`.

Prints one line of JSON on standard output: that the first table is written, or why none can be.
Ends when its standard input closes, since then the process that started it is gone or asks for
it; controller and workers end with it then. Killed or failed, it leaves them to the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import IntrovertError
from configs.schema import RunConfig
from expert_trainer.runtime import ray_session
from server.control.reports import DemandMeter, Gather
from server.process import STOP_TIMEOUT_S
from server.table import CONTROL_SOCKET

if TYPE_CHECKING:
    from server.control.plane import ControlPlane

logger = logging.getLogger("server.control")

END_S = STOP_TIMEOUT_S + 20.0
"""Longest that the end may take: a Ray that dies meanwhile must not hold it up for ever."""


def main() -> int:
    """Run the control plane; the exit code is 0 after an orderly end."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    config = RunConfig.model_validate_json(arguments.config.read_bytes())
    try:
        with ray_session():
            asyncio.run(_run(config, arguments.run_dir, offline=arguments.offline))
    except IntrovertError as error:
        logger.error("%s", error)
        _tell({"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    return 0


async def _run(config: RunConfig, run_dir: Path, *, offline: bool) -> None:
    from server.control.api import create_app, listening
    from server.control.plane import ControlPlane
    from server.control.publisher import Publisher
    from server.gateway_reports import gather_reports

    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    threading.Thread(target=_await_end_of_input, args=(loop, over.set), daemon=True).start()
    plane = ControlPlane(config, run_dir, offline=offline)
    publisher: Publisher | None = None
    alone = plane.is_first  # nobody goes on from where it fails
    try:
        if not await _unless(over, plane.begin()):
            return
        alone = False
        gather = partial(gather_reports, run_dir)
        publisher = Publisher(plane, config, gather, plane.last_change)
        async with listening(create_app(publisher, plane.demand), run_dir / CONTROL_SOCKET):
            _tell({"ready": plane.table.version})
            await _unless(over, _keep(plane, gather))
    finally:
        if publisher is not None:
            await publisher.end()
        if over.is_set() or alone:
            dog = threading.Timer(END_S, os._exit, [1])
            dog.daemon = True
            dog.start()
            await plane.end()


async def _keep(plane: ControlPlane, gather: Gather) -> None:
    """For ever: look after the workers, and tell the controller what they are asked for."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(plane.keep())
        tasks.create_task(_measure(plane, gather))


async def _measure(plane: ControlPlane, gather: Gather) -> None:
    """Every `serving.rebalance_s`, unless nobody was asked for anything: it says nothing."""
    meter = DemandMeter()
    while rebalance_s := plane.config.serving.rebalance_s:
        rates = meter.feed(await gather(), time.monotonic())
        if any(rates.values()):
            await plane.demand(rates)
        await asyncio.sleep(rebalance_s)


async def _unless(over: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work unless it is over before; whether it was done. What it raises is raised."""
    doing = asyncio.create_task(work)
    waiting = asyncio.create_task(over.wait())
    try:
        await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
            return True
        return False
    finally:
        for task in (doing, waiting):
            task.cancel()
        await asyncio.gather(doing, waiting, return_exceptions=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.control", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a RunConfig as JSON")
    parser.add_argument("--run-dir", type=Path, required=True, help="where the table is written")
    parser.add_argument("--offline", action="store_true", help="the engines are a batch's")
    return parser.parse_args()


def _tell(fact: dict[str, object]) -> None:
    """One line of JSON for the process that started this one."""
    sys.stdout.write(json.dumps(fact) + "\n")
    sys.stdout.flush()


def _await_end_of_input(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    logger.info("standard input closed: the control plane ends")
    loop.call_soon_threadsafe(end)


if __name__ == "__main__":
    sys.exit(main())
