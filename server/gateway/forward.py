"""One request through the gateway: read, choose, hand to an engine, hand the answer back.

The hot path. An `Exchange` is a bare ASGI application, so that between uvicorn and the engine's
connection there is nothing but this. What a model name means, where a text goes and how an engine
fails are the other modules' business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

import aiohttp
from starlette.types import Receive, Scope, Send

from router.types import Route
from server.gateway.choice import ROUTED_MODEL, Home, Target
from server.gateway.client import CLIENT_GONE, ClientGoneError, HangUp, read_body
from server.gateway.engine_errors import read_engine_error
from server.gateway.errors import (
    EngineTimeoutError,
    GatewayError,
    InternalError,
    body_of,
    event_of,
)
from server.gateway.parts import Parts
from server.gateway.protocol import NOT_RETURNED, Call, Endpoint, Head, read_head
from server.gateway.upstream import UnreachableError

logger = logging.getLogger(__name__)

RawHeaders = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Progress:
    """What has become of one request so far; headers, metrics and error answers come from it."""

    request_id: str = ""
    target: Target | None = None
    home: Home | None = None
    route: Route | None = None
    status: int = 0
    """Status sent to the client; 0 before any was."""
    began: float = 0.0
    """When the whole body had come; seconds on the performance counter."""
    route_s: float = 0.0
    engine_s: float = 0.0
    """Waiting for the engine, workers that could not be reached included."""


class Exchange:
    """The ASGI application of one forwarded endpoint."""

    def __init__(self, endpoint: Endpoint, parts: Parts) -> None:
        self._endpoint = endpoint
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        progress = Progress()
        try:
            await self._answer(progress, scope, receive, send)
        except ClientGoneError:
            progress.status = CLIENT_GONE
        except GatewayError as error:
            await self._refuse(progress, error, send)
        except Exception:
            if progress.status:
                raise  # too late for an answer: the server closes the connection
            logger.exception("request failed", extra={"request_id": progress.request_id})
            failure = InternalError(
                "The gateway failed on this request. Its log tells why, under the request id "
                f"{progress.request_id}."
            )
            await self._refuse(progress, failure, send)
        finally:
            self._parts.metrics.request_ended(
                self._endpoint.path,
                progress.target.label if progress.target else None,
                progress.home.worker if progress.home else None,
                progress.status,
            )

    async def _answer(self, progress: Progress, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the request and serve it for as long as its client is there."""
        head = read_head(scope)
        progress.request_id = head.request_id
        body = await read_body(receive, head.content_length, self._parts.config.max_body_bytes)
        progress.began = time.perf_counter()
        call = Call(body)
        task = asyncio.current_task()
        assert task is not None
        hang_up = HangUp(receive, task)
        try:
            progress.target = await self._target(progress, call)
            await self._serve(progress, progress.target, head, call, send)
        except asyncio.CancelledError:
            if not hang_up.happened:
                raise
            task.uncancel()
            raise ClientGoneError from None
        finally:
            hang_up.stop()

    async def _target(self, progress: Progress, call: Call) -> Target:
        chooser = self._parts.chooser
        if call.model != ROUTED_MODEL:
            return chooser.named(call.model)
        began = time.perf_counter()
        try:
            fields = call.values(self._endpoint.routed_fields)
            (route,) = await self._parts.routing.route(self._endpoint.kind, [fields])
        finally:
            progress.route_s = time.perf_counter() - began
        self._parts.metrics.routed(progress.route_s, abstained=route.abstained)
        progress.route = route
        return chooser.routed(route.expert)

    async def _serve(
        self, progress: Progress, target: Target, head: Head, call: Call, send: Send
    ) -> None:
        """Hand the call to one of its homes; on to the next as long as none has seen it.

        A request that an engine has begun is not sent to another: one that kills its engine would
        be carried from replica to replica.
        """
        chooser, upstream, metrics = self._parts.chooser, self._parts.upstream, self._parts.metrics
        body = call.body_for(target.model_json)
        tried: set[str] = set()
        while True:
            home = chooser.choose(target, tried)
            if tried:
                metrics.retries.inc()
            progress.home = home
            began = time.perf_counter()
            with chooser.busy(home):
                try:
                    response = await upstream.post(
                        home.url, self._endpoint.path, body, head.forwarded
                    )
                except UnreachableError as error:
                    metrics.upstream_failed(home.worker, "unreachable")
                    if chooser.avoid(home.worker):
                        logger.warning("%s cannot be reached: %s", home.worker, error)
                    tried.add(home.worker)
                    continue
                except GatewayError as error:
                    self._note_failure(home, error)
                    raise
                finally:
                    progress.engine_s += time.perf_counter() - began
                metrics.upstream_first_byte_seconds.observe(time.perf_counter() - began)
                try:
                    await self._hand_back(progress, response, call, send)
                finally:
                    response.close()
                return

    async def _hand_back(
        self, progress: Progress, response: aiohttp.ClientResponse, call: Call, send: Send
    ) -> None:
        assert progress.home is not None
        if response.status < 400 and response.content_type == "text/event-stream":
            await self._stream(progress, response, send)
            return
        began = time.perf_counter()
        try:
            body = await self._parts.upstream.whole(response)
        except GatewayError as error:
            self._note_failure(progress.home, error)
            raise
        progress.engine_s += time.perf_counter() - began
        headers = _returned(response, progress)
        if response.status >= 400:
            if response.status >= 500:
                self._parts.metrics.upstream_failed(progress.home.worker, "answer")
            table = self._parts.chooser.table
            refusal = read_engine_error(
                response.status, body, call, table.max_model_len if table else None
            )
            body = body_of(refusal, self._endpoint.dialect)
            headers = [(n, v) for n, v in headers if n.lower() != b"content-type"]
            headers.append((b"content-type", b"application/json"))
        headers.append((b"content-length", str(len(body)).encode()))
        await self._start(progress, response.status, headers, send)
        await send({"type": "http.response.body", "body": body})

    async def _stream(
        self, progress: Progress, response: aiohttp.ClientResponse, send: Send
    ) -> None:
        assert progress.home is not None
        await self._start(progress, response.status, _returned(response, progress), send)
        last = b""
        try:
            async for data in self._parts.upstream.events(response):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except GatewayError as error:
            self._note_failure(progress.home, error)
            last = event_of(error, self._endpoint.dialect)
        await send({"type": "http.response.body", "body": last})

    async def _start(
        self, progress: Progress, status: int, headers: RawHeaders, send: Send
    ) -> None:
        own = time.perf_counter() - progress.began - progress.route_s - progress.engine_s
        self._parts.metrics.forward_overhead_seconds.observe(own)
        progress.status = status
        await send({"type": "http.response.start", "status": status, "headers": headers})

    async def _refuse(self, progress: Progress, error: GatewayError, send: Send) -> None:
        body = body_of(error, self._endpoint.dialect)
        progress.status = error.status
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", progress.request_id.encode()),
            *error.headers,
        ]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _note_failure(self, home: Home, error: GatewayError) -> None:
        kind = "timeout" if isinstance(error, EngineTimeoutError) else "lost"
        self._parts.metrics.upstream_failed(home.worker, kind)
        logger.warning("%s failed during a request: %s", home.worker, kind)


def _returned(response: aiohttp.ClientResponse, progress: Progress) -> RawHeaders:
    """The engine's headers, less those of its connection, and what this gateway has to say."""
    target, home, route = progress.target, progress.home, progress.route
    assert target is not None
    assert home is not None
    headers = [(n, v) for n, v in response.raw_headers if n.lower() not in NOT_RETURNED]
    headers += (
        (b"x-request-id", progress.request_id.encode()),
        (b"x-introvert-expert", target.label.encode()),
        (b"x-introvert-expert-version", (target.version or "none").encode()),
        (b"x-introvert-worker", home.worker.encode()),
        (b"x-introvert-route-score", b"%.4f" % route.score if route else b"nan"),
        (b"x-introvert-route-ms", b"%.3f" % (progress.route_s * 1000)),
    )
    return headers
