"""A gateway process as its siblings, the driver and the control plane see it: on its Unix socket.

There the whole application answers as on the port, without an admin key, since who can open the
socket is the user that runs the gateway; and two routes more.
"""

from __future__ import annotations

import os

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from server.gateway.parts import Parts
from server.gateway.scrape import Scrape
from server.gateway_reports import REPORT_PATH, GatewayReport

METRICS_PATH = "/internal/metrics"
TRUSTED = "introvert.trusted"
"""Key in the scope of requests that came by the Unix socket."""


class Internal:
    """The ASGI application on the Unix socket."""

    def __init__(self, app: ASGIApp, parts: Parts, scrape: Scrape) -> None:
        self._app, self._parts, self._scrape = app, parts, scrape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope.get("path")
        if path == REPORT_PATH:
            await _send(send, msgspec.json.encode(report(self._parts)))
        elif path == METRICS_PATH:
            await _send(send, await self._scrape.own())
        else:
            await self._app({**scope, TRUSTED: True}, receive, send)


def report(parts: Parts) -> GatewayReport:
    """What a process tells of itself."""
    table, chooser = parts.chooser.table, parts.chooser
    return GatewayReport(
        process=parts.seat.number,
        pid=os.getpid(),
        started=parts.started.isoformat(timespec="seconds"),
        table_version=table.version if table else 0,
        bundle=table.bundle if table else "",
        routers={
            version: f"{status.state}: {status.detail}" if status.detail else status.state
            for version, status in parts.routing.states().items()
        },
        in_flight=chooser.in_flight,
        in_flight_bundles=dict(chooser.in_flight_bundles),
        demand=dict(chooser.demand),
    )


async def _send(send: Send, body: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
