"""One request through the gateway: read, choose, hand to an engine, hand the answer back.

The hot path. An `Exchange` is a bare ASGI application, so that between uvicorn and the engine's
connection there is nothing but this. What a model name means, where a text goes, who waits for
whom and how an engine fails are the other modules' business.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.types import Receive, Scope, Send

from server.gateway.admission import Group
from server.gateway.choice import conversation_key
from server.gateway.client import (
    CLIENT_GONE,
    ClientGoneError,
    Lifeline,
    abort_connection,
    read_body,
)
from server.gateway.connection import Answer
from server.gateway.engine_errors import SetbackError
from server.gateway.errors import (
    DeadlineError,
    ForbiddenModelError,
    GatewayError,
    InternalError,
    YieldingError,
    body_of,
)
from server.gateway.hang_up import watchers_of
from server.gateway.parts import Parts
from server.gateway.passage import Passage
from server.gateway.protocol import Call, Endpoint, Head, new_request_id, read_head
from server.gateway.queueing import wait_for_worker
from server.gateway.returning import hand_back, note_no_answer
from server.gateway.upstream import UnreachableError
from server.gateway.views import Home, Target
from server.table import ROUTED_MODEL

logger = logging.getLogger(__name__)

YIELD_S = 1
"""`Retry-After` of a background request that others go before."""


class Exchange:
    """The ASGI application of one forwarded endpoint."""

    def __init__(self, endpoint: Endpoint, parts: Parts) -> None:
        self._endpoint = endpoint
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        passage = Passage(self._endpoint)
        observation = passage.observation
        observation.endpoint = self._endpoint.path
        try:
            await self._answer(passage, scope, receive, send)
        except ClientGoneError:
            observation.status = CLIENT_GONE
        except GatewayError as error:
            await self._refuse(passage, error, send)
        except Exception:
            if observation.status:
                raise  # too late for an answer: the server closes the connection
            logger.exception("request failed", extra={"request_id": observation.request_id})
            failure = InternalError(
                "The gateway failed on this request. Its log tells why, under the request id "
                f"{observation.request_id}."
            )
            await self._refuse(passage, failure, send)
        finally:
            observation.ended = time.perf_counter()
            self._parts.recorder.ended(observation)

    async def _answer(self, passage: Passage, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the request and serve it for as long as that makes sense."""
        parts, observation = self._parts, passage.observation
        config = parts.config
        arrived = time.perf_counter()
        head = passage.head = read_head(scope, config.max_header_bytes)
        observation.request_id = head.request_id
        tenant = passage.tenant = parts.keyring.identify(scope["headers"])
        observation.tenant = tenant.name
        with parts.keyring.admit(tenant):
            body = await read_body(
                receive, head.content_length, config.max_body_bytes, config.client_timeout_s
            )
            observation.began = time.perf_counter()
            self._tell(passage, head)
            passage.call = Call(body)
            task = asyncio.current_task()
            assert task is not None
            lifeline = passage.lifeline = Lifeline(watchers_of(scope), task)
            try:
                seconds = _seconds(head, config.deadline_s)
                if seconds is not None:
                    lifeline.limit(max(0.0, arrived + seconds - observation.began))
                await self._pass(passage, send)
            except asyncio.CancelledError:
                if not lifeline.end:
                    raise
                task.uncancel()
                if lifeline.end == "deadline":
                    raise _too_late(seconds) from None
                if lifeline.end == "stalled":
                    abort_connection(receive)
                raise ClientGoneError from None
            finally:
                lifeline.stop()

    def _tell(self, passage: Passage, head: Head) -> None:
        """Tell the recorder of the request, and the engine what the recorder has to say."""
        observation, forwarded = passage.observation, head.forwarded
        for name in ("traceparent", "tracestate"):
            if (value := forwarded.get(name)) is not None:
                observation.trace_headers[name] = value
        self._parts.recorder.began(observation)
        if observation.trace_headers:
            forwarded.update(observation.trace_headers)

    async def _pass(self, passage: Passage, send: Send) -> None:
        """Find out who is asked, within one bundle, and ask."""
        chooser, call = self._parts.chooser, passage.call
        assert call is not None
        prompt = call.field(self._endpoint.routed_fields[0], self._parts.config.max_prompt_bytes)
        passage.key = key = conversation_key(prompt)
        view = chooser.view(key)
        if call.model != ROUTED_MODEL:
            view, target = chooser.named(call.model, view)
            passage.view, passage.target = view, target
            if not passage.tenant.may_ask(target.label):
                raise _forbidden(target.label)
            await self._serve_in_view(passage, send)
            return
        if view is not chooser.served and not self._parts.routing.ready(view.bundle):
            view = chooser.served
        passage.view = view
        await self._serve_in_view(passage, send)

    async def _serve_in_view(self, passage: Passage, send: Send) -> None:
        """Serve a request that has taken its view, counted as one of that bundle's."""
        view, observation = passage.view, passage.observation
        assert view is not None
        in_flight = self._parts.chooser.in_flight_bundles
        observation.bundle = view.bundle
        in_flight[view.bundle] += 1
        try:
            target = passage.target
            if target is None:
                target = passage.target = await self._routed(passage)
            observation.expert = target.label
            observation.expert_version = target.version or ""
            await self._serve(passage, send)
        finally:
            in_flight[view.bundle] -= 1

    async def _routed(self, passage: Passage) -> Target:
        """The target of a request that is routed by meaning."""
        call, view, observation = passage.call, passage.view, passage.observation
        assert call is not None
        assert view is not None
        began = time.perf_counter()
        try:
            fields = call.values(self._endpoint.routed_fields)
            (route,) = await self._parts.routing.route(
                self._endpoint.kind, [fields], bundle=view.bundle
            )
        finally:
            observation.route_s = time.perf_counter() - began
        observation.route = route
        passage.threshold = self._parts.routing.threshold_of(view.bundle)
        observation.routed_by = route.by
        target = view.allowed(route, passage.tenant.may_ask)
        if target is None:
            raise _forbidden(route.expert or view.base.label)
        return target

    async def _serve(self, passage: Passage, send: Send) -> None:
        """Hand the call to one of its homes; on to the next as long as none has begun it.

        One whose engine died before the answer began goes to one more, and to no third: a request
        that kills its engine would be carried from replica to replica.
        """
        parts, observation, target = self._parts, passage.observation, passage.target
        chooser = parts.chooser
        assert target is not None
        tried: set[str] = set()
        ticket: Group | None
        while True:
            home = chooser.choose(target, passage.key, tried)
            assert passage.head is not None
            if passage.head.background:
                home, ticket = self._enter_behind(home, target)
            else:
                ticket = home.lane.enter(target.lane_name) if home is not None else None
            if home is None or ticket is None:
                home, ticket = await wait_for_worker(parts, passage, home, tried)
                target = passage.target
                assert target is not None
                observation.expert = target.label
                observation.expert_version = target.version or ""
            try:
                if await self._ask(passage, home, ticket, send):
                    return
            except SetbackError as setback:
                logger.info("%s: another home is asked", setback)
            tried.add(home.worker)
            observation.retries += 1

    def _enter_behind(self, home: Home | None, target: Target) -> tuple[Home, Group]:
        """A background request's ticket; it waits for nobody and goes nowhere else.

        Raises:
            YieldingError: others go first.
            NoEngineError: no worker is to hold the expert.
        """
        chooser = self._parts.chooser
        if home is None and chooser.hopeless(target):
            raise chooser.no_engine(target)
        below = self._parts.config.batch_concurrency
        ticket = home.lane.enter_behind(target.lane_name, below) if home is not None else None
        if home is None or ticket is None:
            raise YieldingError(
                f"Requests of batches wait for '{target.served_name}' until fewer than {below} are "
                f"in flight on its worker. Try again in {YIELD_S} s.",
                retry_after_s=YIELD_S,
            )
        return home, ticket

    async def _ask(self, passage: Passage, home: Home, ticket: Group, send: Send) -> bool:
        """Ask one worker, whose lane has let the request in; false if it cannot be reached.

        Raises:
            SetbackError: another home is to be asked.
        """
        parts, observation, target = self._parts, passage.observation, passage.target
        assert target is not None
        counts, breakers, worker = parts.counts, parts.chooser.breakers, home.worker
        passage.home = home
        observation.worker = worker
        if home.residency is not None and target.expert is not None:
            observation.cold = home.residency.touch(target.served_name)
        trial = breakers.began(worker) if breakers.troubled else False
        verdict = False
        served: float | None = None
        counts.add(worker, 1)
        began = time.perf_counter()
        try:
            response = await self._post(passage, home)
            observation.engine_s += time.perf_counter() - began
            if breakers.troubled and response.status < 500:  # a dead engine's server answers, too
                parts.chooser.recovered(worker)
            try:
                whole = await hand_back(parts, passage, response, send)
            finally:
                response.close()
            verdict = True
            if whole:
                served = time.perf_counter() - began
                if breakers.troubled:
                    breakers.succeeded(worker)
            return True
        except UnreachableError as error:
            verdict = True
            observation.engine_s += time.perf_counter() - began
            parts.metrics.upstream_failed(worker, "unreachable")
            if breakers.failed(worker):
                logger.warning("%s cannot be reached and is left alone: %s", worker, error)
            return False
        except GatewayError as error:
            verdict = True
            note_no_answer(parts, passage, error)
            raise
        finally:
            if trial and not verdict:
                breakers.abandoned(worker)
            counts.add(worker, -1)
            if home.residency is not None and target.expert is not None:
                home.residency.touch(target.served_name)  # the engine has used it until now
            home.lane.leave(ticket, served)
            wanted = passage.wanted
            if wanted is not None:
                parts.chooser.demand[wanted] += time.perf_counter() - began

    async def _post(self, passage: Passage, home: Home) -> Answer:
        call, head, target = passage.call, passage.head, passage.target
        assert call is not None
        assert head is not None
        assert target is not None
        return await self._parts.upstream.post(
            home.url, self._endpoint.path, call.body_for(target.model_json), head.forwarded
        )

    async def _refuse(self, passage: Passage, error: GatewayError, send: Send) -> None:
        observation = passage.observation
        body = body_of(error, self._endpoint.dialect)
        observation.status = error.status
        observation.error = error.code
        observation.request_id = observation.request_id or new_request_id()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", observation.request_id.encode()),
            *error.headers,
        ]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _seconds(head: Head, limit: float | None) -> float | None:
    """How long a request may take: as its client says, and no longer than configured."""
    if head.deadline_s is None:
        return limit
    return head.deadline_s if limit is None else min(limit, head.deadline_s)


def _too_late(seconds: float | None) -> DeadlineError:
    return DeadlineError(
        f"The request was not answered within its {seconds or 0:g} s. Allow it more time, ask for "
        "fewer tokens, or stream."
    )


def _forbidden(model: str) -> ForbiddenModelError:
    return ForbiddenModelError(
        f"This API key may not ask '{model}'. GET /v1/models lists what it may.", param="model"
    )
