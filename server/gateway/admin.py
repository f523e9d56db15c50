"""`/admin/*`: the state of the whole endpoint, and the change of its bundle.

Changing anything needs the admin key. So does looking, if a key is configured; without one, looking
is free, and the key that the driver made is for changes alone. Whoever comes by the Unix socket is
the user who runs the gateway. The bundle is changed by the control plane; this module passes on
what it is asked and what it answers, and opens no file that a request names.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from importlib.metadata import version as package_version
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from expert_trainer.remote import redacted
from server.gateway.admin_answers import (
    BundleAnswer,
    BundleChange,
    BundleRequest,
    ProcessAnswer,
    StatusAnswer,
)
from server.gateway.answers import report_ready
from server.gateway.documented import errors
from server.gateway.errors import (
    ControlPlaneError,
    InvalidParameterError,
    UnauthorizedError,
)
from server.gateway.internal import TRUSTED, report
from server.gateway.limits import body_of_request, limited_head
from server.gateway.metrics import PREFIX
from server.gateway.parts import Parts
from server.gateway.protocol import parse_object
from server.gateway.scrape import Scrape
from server.gateway.tallies import Snapshot
from server.gateway.tenants import bearer_of
from server.gateway_reports import REPORT_PATH, GatewayReport, SocketError, ask, ask_all
from server.keys import digest_of
from server.table import CONTROL_SOCKET, RoutingTable

CHANGE_TIMEOUT_S = 60.0
"""For the control plane to look at a bundle and say whether it begins to change to it."""
LOOK_TIMEOUT_S = 2.0
MAX_CHANGE_BYTES = 64 * 1024


class AdminGate:
    """Who may use the admin routes."""

    def __init__(self, parts: Parts) -> None:
        self._looking_is_free = parts.config.admin_key_sha256 is None
        sha256 = parts.config.admin_key_sha256 or parts.seat.admin_sha256
        self._digest = bytes.fromhex(sha256) if sha256 else None

    def may_look(self, request: Request) -> None:
        """See that the request may be answered with the endpoint's state.

        Raises:
            UnauthorizedError: it may not.
        """
        if not self._looking_is_free:
            self.may_change(request)

    def may_change(self, request: Request) -> None:
        """See that the request has the admin key.

        Raises:
            UnauthorizedError: it has not.
        """
        if request.scope.get(TRUSTED):
            return
        if self._digest is None:
            raise UnauthorizedError(
                "This gateway has no admin key, so nothing can be changed through it. Start it "
                "with `introvert serve`, or configure 'gateway.admin_key_sha256'."
            )
        key = bearer_of(request.scope["headers"])
        if key is None or not hmac.compare_digest(digest_of(key), self._digest):
            raise UnauthorizedError(
                "The admin key is needed: 'Authorization: Bearer KEY'. Where none is configured, "
                "it lies in the cache directory of the user who runs the gateway, in "
                "introvert/admin-PORT.key; API keys are others."
            )


def admin_routes(parts: Parts, scrape: Scrape) -> APIRouter:
    """Status, and the change of the bundle."""
    routes = APIRouter(
        prefix="/admin", tags=["operation"], dependencies=[limited_head(parts.config)]
    )
    gate = AdminGate(parts)

    @routes.get("/status", responses=errors(401))
    async def status(request: Request) -> StatusAnswer:
        """Everything that the gateway processes know: what `introvert status` prints."""
        gate.may_look(request)
        return await _status(parts, scrape)

    @routes.get(
        "/bundle", response_model=BundleAnswer, responses=errors(401, 503), response_class=Response
    )
    async def bundle(request: Request) -> Response:
        """The bundle that is served, and the change under way, if there is one."""
        gate.may_look(request)
        return await _control(parts, "GET", "/bundle", timeout_s=LOOK_TIMEOUT_S)

    @routes.post(
        "/bundle",
        status_code=202,
        response_model=BundleChange,
        response_class=Response,
        responses=errors(400, 401, 409, 413, 503),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": BundleRequest.model_json_schema()}},
            }
        },
    )
    async def change(request: Request) -> Response:
        """Begin to serve another bundle: load and verify it beside the old, then switch."""
        gate.may_change(request)
        body = await body_of_request(request, parts.config, MAX_CHANGE_BYTES)
        asked = _bundle_request(body)
        return await _control(parts, "POST", "/bundle", asked.model_dump_json().encode())

    @routes.post(
        "/bundle/promote",
        response_model=BundleChange,
        response_class=Response,
        responses=errors(400, 401, 404, 409, 503),
    )
    async def promote(request: Request) -> Response:
        """Have the canary answer everything."""
        gate.may_change(request)
        return await _control(parts, "POST", "/bundle/promote")

    @routes.post(
        "/bundle/abort",
        response_model=BundleChange,
        response_class=Response,
        responses=errors(400, 401, 404, 409, 503),
    )
    async def abort(request: Request) -> Response:
        """Stay with the bundle that is served; unload what was loaded of the other."""
        gate.may_change(request)
        return await _control(parts, "POST", "/bundle/abort")

    return routes


async def _control(
    parts: Parts,
    method: str,
    path: str,
    body: bytes | None = None,
    timeout_s: float = CHANGE_TIMEOUT_S,
) -> Response:
    """What the control plane answers.

    Raises:
        ControlPlaneError: it does not.
    """
    if parts.seat.run_dir is None:
        raise ControlPlaneError(
            "This gateway runs without a control plane. Start it with `introvert serve`.",
            retry_after_s=parts.config.retry_after_s,
        )
    try:
        status, answer = await ask(
            parts.seat.run_dir / CONTROL_SOCKET, method, path, body, timeout_s=timeout_s
        )
    except SocketError:
        raise ControlPlaneError(
            "The control plane does not answer; it is started again when it has died. Requests "
            f"are served meanwhile. Try again in {parts.config.retry_after_s} s.",
            retry_after_s=parts.config.retry_after_s,
        ) from None
    return Response(answer, status, media_type="application/json")


def _bundle_request(body: bytes) -> BundleRequest:
    try:
        return BundleRequest.model_validate(parse_object(body))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"][:1]) or None
        raise InvalidParameterError(
            f"The request cannot be read: {fault['msg']}. Send {{'path': a directory or URL}} and, "
            "for a trial with a share of the conversations, 'canary': a number in (0, 1).",
            param=where,
        ) from None


async def _status(parts: Parts, scrape: Scrape) -> StatusAnswer:
    answers, snapshots, change = await asyncio.gather(
        ask_all(parts.seat.siblings(), REPORT_PATH), scrape.added_up(), _change(parts)
    )
    reports = [msgspec.json.decode(body, type=GatewayReport) for body in answers.values()]
    reports = sorted([report(parts), *reports], key=lambda one: one.process)
    in_flight: Counter[str] = Counter()
    for one in reports:
        in_flight.update(one.in_flight)
    return StatusAnswer(
        version=package_version("introvert"),
        pid=report(parts).pid,
        started=parts.started.isoformat(timespec="seconds"),
        ready=report_ready(parts.readiness, parts.routing.status),
        router=parts.routing.status,
        in_flight=dict(in_flight),
        queued=_values(snapshots, "queued"),
        requests=_values(snapshots, "expert_requests"),
        cold_loads=_values(snapshots, "cold_loads"),
        processes=[
            ProcessAnswer(
                process=one.process,
                pid=one.pid,
                started=one.started,
                table_version=one.table_version,
                in_flight=sum(one.in_flight.values()),
            )
            for one in reports
        ],
        processes_expected=parts.seat.processes,
        change=change,
        table=_shown(parts.chooser.table),
    )


def _shown(table: RoutingTable | None) -> RoutingTable | None:
    """The table as it may be shown to whoever asks: a bundle's URL may hold a password."""
    if table is None:
        return None
    canary = table.canary
    if canary is not None:
        canary = canary.model_copy(update={"place": redacted(canary.place)})
    return table.model_copy(update={"place": redacted(table.place), "canary": canary})


def _values(snapshots: list[Snapshot], name: str) -> dict[str, int]:
    """A family's values by its only label."""
    for one in snapshots:
        if one.name == f"{PREFIX}_{name}":
            return {labels[0]: int(row[0]) for labels, row in one.samples if labels}
    return {}


async def _change(parts: Parts) -> dict[str, Any] | None:
    """The change of the bundle under way or just over; none: there is none, or nobody to ask."""
    if parts.seat.run_dir is None:
        return None
    try:
        status, body = await ask(
            parts.seat.run_dir / CONTROL_SOCKET, "GET", "/bundle", timeout_s=LOOK_TIMEOUT_S
        )
    except SocketError:
        return None
    document = msgspec.json.decode(body) if status == 200 else {}
    change = document.get("change")
    return change if isinstance(change, dict) else None
