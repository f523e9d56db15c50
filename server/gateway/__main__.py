"""The gateway process: `python -m server.gateway --config FILE --table FILE`.

Prints one line of JSON on standard output: the URL once it listens, or why it cannot. Ends when
its standard input closes, since then the process that started it is gone, and on SIGTERM or SIGINT;
running requests get `gateway.drain_timeout_s` to finish.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import uvicorn
import uvloop
from pydantic import ValidationError

from configs.errors import IntrovertError
from configs.schema import GatewayConfig, RunConfig
from server.errors import PortTakenError
from server.gateway.app import create_app
from server.gateway.errors import GatewayStartError
from server.gateway.logs import log_to_stderr
from server.gateway.routing import router_from_bundle
from server.gateway.tables import TableFile

logger = logging.getLogger("server.gateway")

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""Longer than common clients keep an idle connection, so that it is they who close it: otherwise
a request could be sent into a connection that is being closed here."""


def main() -> int:
    """Run the gateway; the exit code is 0 after an orderly end."""
    arguments = _arguments()
    log_to_stderr()
    try:
        config = _read_config(arguments.config)
        listening = listen(config.gateway)
    except IntrovertError as error:
        logger.error("%s", error)
        _tell({"error": str(error)})
        return error.exit_code
    app = create_app(config, TableFile(arguments.table), partial(router_from_bundle, config))
    server = Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(config.gateway.drain_timeout_s),
        ),
        url=url_of(config.gateway.host, listening),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(server, listening))


class Server(uvicorn.Server):
    """A uvicorn server that tells its URL once it listens."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            logger.info("listening on %s", self._url)
            _tell({"url": self._url})


async def serve(server: Server, listening: socket.socket) -> int:
    """Serve until a signal comes or standard input closes."""
    loop = asyncio.get_running_loop()

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn raises the signals that it caught once more when it has drained; these handlers make
    # that an orderly end, with 0 as the exit code.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    threading.Thread(target=_await_end_of_input, args=(loop, end), daemon=True).start()
    await server.serve(sockets=[listening])
    return 0 if server.started else 1


def listen(config: GatewayConfig) -> socket.socket:
    """A socket bound to the configured address.

    Raises:
        PortTakenError: another process listens there.
        GatewayStartError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(config.host, config.port) from None
        raise GatewayStartError(
            f"cannot listen on {config.host}:{config.port}: {os.strerror(error.errno or 0)}; "
            "choose another 'gateway.host' or 'gateway.port'"
        ) from None
    listening.set_inheritable(False)
    return listening


def url_of(host: str, listening: socket.socket) -> str:
    """URL under which a client on this machine reaches a socket."""
    port = listening.getsockname()[1]
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = anywhere.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.gateway", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a RunConfig as JSON")
    parser.add_argument("--table", type=Path, required=True, help="the routing table's file")
    return parser.parse_args()


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
