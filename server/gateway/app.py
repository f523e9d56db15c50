"""The HTTP application: its routes and their documentation, its errors, and its life.

Forwarded endpoints are bare ASGI applications with a documented face; everything the gateway
answers itself is ordinary FastAPI. This module knows nothing of processes, ports or files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from importlib.metadata import version as package_version
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from configs.schema import RunConfig
from server.gateway.admin import admin_routes
from server.gateway.answers import AnthropicErrorAnswer, ErrorAnswer
from server.gateway.batches import batch_routes
from server.gateway.client import CLIENT_GONE, ClientGoneError
from server.gateway.documented import errors
from server.gateway.errors import (
    GatewayError,
    InternalError,
    MethodNotAllowedError,
    UnknownPathError,
    body_of,
)
from server.gateway.forward import Exchange
from server.gateway.internal import METRICS_PATH, Internal
from server.gateway.own import own_routes
from server.gateway.parts import ALONE, Parts
from server.gateway.protocol import ENDPOINTS, Endpoint
from server.gateway.routing import RouterSource
from server.gateway.scrape import Scrape
from server.gateway.seat import Seat
from server.gateway.tables import TableSource

logger = logging.getLogger(__name__)

REFUSALS = (401, 403, 404, 413, 422, 429, 501, 502, 503, 504)
"""Statuses of error answers, the gateway's own and those that it passes on from engines."""

CATCH_UP_S = 10.0
CATCH_UP_LOOK_S = 0.01

ANSWER_HEADERS = {
    "x-request-id": "The client's own id, or a new one.",
    "x-introvert-expert": "Id of the expert that answered, or `base`.",
    "x-introvert-expert-version": "Its content hash; `none` for the base.",
    "x-introvert-worker": "The worker that answered.",
    "x-introvert-route-score": "Cosine of the text and the expert; `nan` where none was routed.",
    "x-introvert-route-ms": "Milliseconds spent on routing.",
    "x-introvert-spill": "`runner-up` or `base`: the wait for the routed expert was too long, so "
    "that answered in its place; else not there.",
    "x-introvert-routed-expert": "Id of the routed expert, where another answered.",
}


def create_app(
    config: RunConfig,
    table_source: TableSource,
    router_source: RouterSource,
    seat: Seat = ALONE,
) -> FastAPI:
    """The gateway as an ASGI application.

    Args:
        config: the run; `gateway`, `seed` and where its scratch directory is are read of it.
        table_source: hands out routing tables for as long as the application lives.
        router_source: loads the router; called once, in a thread.
        seat: the process' place among several; its Unix socket gets `app.state.internal`.

    Raises:
        KeysError: the file of API keys cannot be used.
    """
    parts = Parts.make(config, router_source, seat)
    scrape = Scrape(parts.metrics, seat, METRICS_PATH)
    app = Application(
        title="Introvert",
        version=package_version("introvert"),
        description="Experts chosen by meaning, behind one OpenAI-compatible endpoint.",
        lifespan=_life(parts, table_source),
    )
    app.exchanges = {e.path: Exchange(e, parts) for e in ENDPOINTS}
    app.router.routes[:0] = [ForwardedRoute(e, app.exchanges[e.path]) for e in ENDPOINTS]
    app.include_router(own_routes(parts, scrape))
    app.include_router(batch_routes(parts))
    app.include_router(admin_routes(parts, scrape))
    app.add_exception_handler(GatewayError, _answer_gateway_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientGoneError, _answer_nobody)
    app.add_exception_handler(Exception, _answer_defect)
    app.state.internal = Internal(app, parts, scrape)
    return app


class Application(FastAPI):
    """A FastAPI application that hands the busy endpoints to their exchanges at once.

    An exchange answers every error itself; the layers that FastAPI puts around a route would cost
    a request as much as all of the gateway's own work.
    """

    exchanges: Mapping[str, ASGIApp] = MappingProxyType({})
    """By path; a request that is not a POST goes the long way, to be refused."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            exchange = self.exchanges.get(scope["path"])
            if exchange is not None:
                await exchange(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


class ForwardedRoute(APIRoute):
    """A route that OpenAPI documents like any other, while its requests go straight to an ASGI
    application: FastAPI's handling of a request costs more than all of the forwarding."""

    def __init__(self, endpoint: Endpoint, exchange: ASGIApp) -> None:
        async def forwarded() -> None:
            """Answered by an engine; `model` chooses which, all else is passed on as it is."""

        error = AnthropicErrorAnswer if endpoint.dialect == "anthropic" else ErrorAnswer
        super().__init__(
            endpoint.path,
            forwarded,
            methods=["POST"],
            name=endpoint.kind,
            summary=endpoint.summary,
            tags=["inference"],
            response_class=Response,
            responses={
                200: {
                    "description": "The engine's answer; events where `stream` is true.",
                    "headers": {
                        name: {"description": text, "schema": {"type": "string"}}
                        for name, text in ANSWER_HEADERS.items()
                    },
                    "content": {
                        "application/json": {"schema": {"type": "object"}},
                        "text/event-stream": {},
                    },
                },
                **errors(*REFUSALS, model=error),
            },
            openapi_extra={"requestBody": _documented_body(endpoint)},
        )
        self.app = exchange


def _documented_body(endpoint: Endpoint) -> dict[str, Any]:
    prompt = endpoint.routed_fields[0]
    schema = {
        "type": "object",
        "required": ["model", prompt],
        "properties": {
            "model": {
                "type": "string",
                "description": "`introvert` to route by meaning, an expert's id, or the base.",
            },
            prompt: {"description": "What the model is asked."},
            "stream": {"type": "boolean", "default": False},
        },
        "additionalProperties": True,
    }
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _life(parts: Parts, table_source: TableSource) -> Any:
    """The application's start and end: connections, the table's follower, the router's loading."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(_follow(parts, table_source)),
            asyncio.create_task(parts.keyring.follow()),
        ]
        try:
            if parts.seat.again:
                await _catch_up(parts)
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            parts.routing.close()
            parts.upstream.close()
            await parts.recorder.close()
            parts.store.close()

    return life


async def _catch_up(parts: Parts) -> None:
    """Have a table and a router before anything is accepted: whoever connects to a process that
    died waits for the next one, and is not to be told by that one that it has neither yet."""
    try:
        async with asyncio.timeout(CATCH_UP_S):
            # nobody else waits for these, and this only once in a process' life
            while (  # noqa: ASYNC110
                parts.chooser.table is None or parts.routing.status.state == "loading"
            ):
                await asyncio.sleep(CATCH_UP_LOOK_S)
    except TimeoutError:
        logger.warning("there is no table or no router after %g s: going on without", CATCH_UP_S)


async def _follow(parts: Parts, table_source: TableSource) -> None:
    async for table in table_source.follow():
        try:
            parts.use(table)
        except Exception:
            logger.exception("routing table %d cannot be used, the last one stays", table.version)
        else:
            now = parts.readiness.coverage
            logger.info(
                "routing table %d: %d of %d experts ready on %d of %d workers",
                table.version,
                now.experts_ready,
                now.experts_total,
                now.workers_ready,
                now.workers_total,
            )


def _answer(error: GatewayError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(body_of(error), error.status, headers, media_type="application/json")


async def _answer_gateway_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return _answer(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    if error.status_code == MethodNotAllowedError.status:
        allow = (error.headers or {}).get("Allow", "")
        return _answer(
            MethodNotAllowedError(
                f"{request.method} is not possible on {request.url.path}; use {allow}.",
                allow=allow,
            )
        )
    return _answer(
        UnknownPathError(
            f"There is nothing at {request.method} {request.url.path[:200]}. GET /openapi.json "
            "lists what there is."
        )
    )


async def _answer_nobody(_: Request, error: Exception) -> Response:
    """A client that hung up is no defect; what is answered, the server drops."""
    assert isinstance(error, ClientGoneError)
    return Response(status_code=CLIENT_GONE)


async def _answer_defect(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(InternalError("The gateway failed on this request. Its log tells why."))
