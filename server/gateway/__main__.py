"""The gateway process: `python -m server.gateway --config FILE --table FILE`.

Prints one line of JSON on standard output: the URL once it listens, or why it cannot. Ends when
its standard input closes, since then the process that started it is gone, and on SIGTERM or SIGINT;
running requests get `gateway.drain_timeout_s` to finish.

One of several gets its socket from the driver (`--listen-fd`) and has a Unix socket besides.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn
import uvloop
from fastapi import FastAPI
from pydantic import ValidationError

from configs.errors import IntrovertError
from configs.schema import GatewayConfig, RunConfig
from server.gateway.app import create_app
from server.gateway.errors import GatewayStartError
from server.gateway.heads import protocol_for
from server.gateway.logs import log_to_stderr
from server.gateway.memory import settle, settling
from server.gateway.routing import router_from_bundle
from server.gateway.seat import Seat
from server.gateway.tables import TableFile
from server.sockets import BACKLOG, listen, listen_at, url_of
from server.table import ENGINE_KEY_FILE, GATEWAY_SOCKET

logger = logging.getLogger("server.gateway")

KEEP_ALIVE_S = 75
"""Longer than common clients keep an idle connection, so that it is they who close it: otherwise
a request could be sent into a connection that is being closed here."""


def main() -> int:
    """Run the gateway; the exit code is 0 after an orderly end."""
    arguments = _arguments()
    log_to_stderr()
    try:
        config = _read_config(arguments.config)
        seat = _seat(arguments)
        listening, inside = _listen(config.gateway, arguments.listen_fd, seat)
        source = settling(partial(router_from_bundle, config))
        app = create_app(config, TableFile(arguments.table), source, seat)
    except IntrovertError as error:
        logger.error("%s", error)
        _tell({"error": str(error)})
        return error.exit_code
    server = Server(_settings(app, config.gateway), url=url_of(config.gateway.host, listening))
    internal = None
    if inside is not None:
        settings = _settings(app.state.internal, config.gateway, lifespan="off")
        internal = InternalServer(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(server, listening, internal, inside))


class Server(uvicorn.Server):
    """A uvicorn server that tells its URL once it listens."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        settle()
        if self.started:
            self.listens.set()

    def tell(self) -> None:
        """Say where it listens."""
        logger.info("listening on %s", self._url)
        _tell({"url": self._url})


class InternalServer(uvicorn.Server):
    """The server on the Unix socket, which leaves the signals to the other one."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


async def serve(
    server: Server,
    listening: socket.socket,
    internal: InternalServer | None = None,
    inside: socket.socket | None = None,
) -> int:
    """Serve until a signal comes or standard input closes."""
    loop = asyncio.get_running_loop()

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn raises the signals that it caught once more when it has drained; these handlers make
    # that an orderly end, with 0 as the exit code.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    threading.Thread(target=_await_end_of_input, args=(loop, end), daemon=True).start()
    beside = asyncio.create_task(_serve_inside(server, internal, inside))
    try:
        await server.serve(sockets=[listening])
    finally:
        if internal is not None:
            internal.should_exit = True
        if not server.listens.is_set():
            beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
    return 0 if server.started else 1


async def _serve_inside(
    server: Server, internal: InternalServer | None, inside: socket.socket | None
) -> None:
    """Serve the Unix socket, once the application has begun; then say where the gateway is."""
    await server.listens.wait()
    server.tell()  # the Unix socket listens already: who asks there now waits for a moment
    if internal is not None:
        assert inside is not None
        await internal.serve(sockets=[inside])


def _settings(app: FastAPI, config: GatewayConfig, lifespan: str = "on") -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol_for(config),
        ws="none",
        lifespan="on" if lifespan == "on" else "off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(config.drain_timeout_s),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.gateway", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a RunConfig as JSON")
    parser.add_argument("--table", type=Path, required=True, help="the routing table's file")
    parser.add_argument("--listen-fd", type=int, help="a TCP socket to listen on, inherited")
    parser.add_argument("--number", type=int, help="number of this process, from 0")
    parser.add_argument("--processes", type=int, default=1, help="how many there are")
    parser.add_argument("--again", action="store_true", help="another process had this number")
    parser.add_argument("--admin-sha256", help="SHA-256 of the admin key, where none is configured")
    return parser.parse_args()


def _seat(arguments: argparse.Namespace) -> Seat:
    """The place that the driver gave this process; the run directory is the table's."""
    directory = arguments.table.parent
    try:
        engine_key = (directory / ENGINE_KEY_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        engine_key = None
    except OSError as error:
        raise GatewayStartError(f"{ENGINE_KEY_FILE} cannot be read: {error.strerror}") from None
    return Seat(
        run_dir=directory if arguments.number is not None else None,
        number=arguments.number or 0,
        processes=arguments.processes,
        engine_key=engine_key,
        again=arguments.again,
        admin_sha256=arguments.admin_sha256,
    )


def _listen(
    config: GatewayConfig, descriptor: int | None, seat: Seat
) -> tuple[socket.socket, socket.socket | None]:
    """The sockets for everybody and, in a run directory, for this machine's own processes."""
    if descriptor is None:
        (listening,) = listen(config.host, config.port)
    else:
        listening = socket.socket(fileno=descriptor)
    listening.set_inheritable(False)
    if seat.run_dir is None:
        return listening, None
    return listening, listen_at(seat.run_dir / GATEWAY_SOCKET.format(seat.number))


def _read_config(path: Path) -> RunConfig:
    try:
        return RunConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise GatewayStartError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise GatewayStartError(f"{path} is not a run's config: {error}") from None


def _tell(fact: dict[str, str]) -> None:
    """One line of JSON for the process that started this one."""
    sys.stdout.write(json.dumps(fact) + "\n")
    sys.stdout.flush()


def _await_end_of_input(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    logger.info("standard input closed: the gateway ends")
    loop.call_soon_threadsafe(end)


if __name__ == "__main__":
    sys.exit(main())
