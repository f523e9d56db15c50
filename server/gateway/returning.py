"""An engine's answer on its way back to the client: bytes as they come, and headers of ours.

A stream is never gathered; an error answer gets our shape. This module chooses nothing.
"""

from __future__ import annotations

import logging
import time

from starlette.types import Message, Send

from server.gateway.connection import Answer
from server.gateway.engine_errors import SetbackError, read_engine_error, read_setback
from server.gateway.errors import (
    EngineLostError,
    EngineTimeoutError,
    GatewayError,
    body_of,
    event_of,
)
from server.gateway.parts import Parts
from server.gateway.passage import Passage
from server.gateway.protocol import NOT_RETURNED
from server.gateway.usage import TAIL_BYTES, read_usage

logger = logging.getLogger(__name__)

RawHeaders = list[tuple[bytes, bytes]]


async def hand_back(parts: Parts, passage: Passage, response: Answer, send: Send) -> bool:
    """Send an engine's answer to the client; whether it came to its end.

    Raises:
        EngineLostError: the connection broke before the end, and nothing has been sent.
        EngineTimeoutError: the engine was silent for too long, and nothing has been sent.
        SetbackError: another home is to be asked, and nothing has been sent.
    """
    if response.status < 400 and response.content_type == b"text/event-stream":
        return await _stream(parts, passage, response, send)
    return await _whole(parts, passage, response, send)


async def _whole(parts: Parts, passage: Passage, response: Answer, send: Send) -> bool:
    observation, call = passage.observation, passage.call
    assert call is not None
    assert passage.lifeline is not None
    began = time.perf_counter()
    body = await parts.upstream.whole(response)
    observation.engine_s += time.perf_counter() - began
    alive = response.status < 400 or _look_for_setback(parts, passage, response.status, body)
    passage.lifeline.unlimit()
    headers = _headers(response, passage)
    if response.status >= 400:
        if response.status >= 500:
            parts.metrics.upstream_failed(observation.worker, "answer")
        table = parts.chooser.table
        refusal = read_engine_error(
            response.status, body, call, table.max_model_len if table else None
        )
        observation.error = refusal.code
        body = body_of(refusal, passage.endpoint.dialect)
        headers = [(n, v) for n, v in headers if n.lower() != b"content-type"]
        headers.append((b"content-type", b"application/json"))
    else:
        observation.prompt_tokens, observation.output_tokens = read_usage(body[-TAIL_BYTES:])
    headers.append((b"content-length", b"%d" % len(body)))
    await _start(passage, response.status, headers, send)
    await send({"type": "http.response.body", "body": body})
    return alive


def _look_for_setback(parts: Parts, passage: Passage, status: int, body: bytes) -> bool:
    """Whether the engine that sent an error answer lives.

    Raises:
        SetbackError: another home is to be asked.
    """
    chooser, target, worker = parts.chooser, passage.target, passage.observation.worker
    assert target is not None
    setback = read_setback(status, body)
    if setback == "unknown-model" and target.expert is not None and chooser.places(target):
        # It let the expert go, as it was told to, while the request was on its way.
        raise SetbackError(f"{worker} does not hold {target.served_name} now")
    if setback != "dead-engine":
        return True
    if chooser.breakers.failed(worker, for_certain=True):
        logger.warning("the engine of %s is dead: it is left alone", worker)
    if not passage.survived:
        passage.survived = True
        parts.metrics.upstream_failed(worker, "answer")
        raise SetbackError(f"the engine of {worker} is dead")
    return False


async def _stream(parts: Parts, passage: Passage, response: Answer, send: Send) -> bool:
    """Pass events on; a client that takes none of them for too long loses its stream."""
    observation, lifeline = passage.observation, passage.lifeline
    assert lifeline is not None
    lifeline.unlimit()
    lifeline.guard_sending(parts.config.client_timeout_s)
    observation.streamed = True
    await _start(passage, response.status, _headers(response, passage), send)
    clock = lifeline.clock
    before = last = b""
    message: Message
    try:
        async for data in parts.upstream.events(response):
            before, last = last, data
            message = {"type": "http.response.body", "body": data, "more_body": True}
            lifeline.sending = clock()
            await send(message)
            lifeline.sending = 0.0
    except GatewayError as error:
        note_failure(parts, observation.worker, error)
        observation.error = error.code
        await send(
            {"type": "http.response.body", "body": event_of(error, passage.endpoint.dialect)}
        )
        return False
    observation.prompt_tokens, observation.output_tokens = read_usage(
        (before[-TAIL_BYTES:] + last)[-TAIL_BYTES:]
    )
    await send({"type": "http.response.body", "body": b""})
    return True


async def _start(passage: Passage, status: int, headers: RawHeaders, send: Send) -> None:
    o = passage.observation
    o.overhead_s = time.perf_counter() - o.began - o.route_s - o.queue_s - o.engine_s
    o.status = status
    await send({"type": "http.response.start", "status": status, "headers": headers})


def note_no_answer(parts: Parts, passage: Passage, error: GatewayError) -> None:
    """Count a worker of whose answer nothing has been sent to the client.

    Raises:
        SetbackError: another home is to be asked.
    """
    worker = passage.observation.worker
    if note_failure(parts, worker, error):
        logger.warning("%s keeps failing and is left alone: %s", worker, error.code)
    if isinstance(error, EngineLostError) and not passage.survived:
        passage.survived = True
        raise SetbackError(f"{worker} was lost before it answered") from error


def note_failure(parts: Parts, worker: str, error: GatewayError) -> bool:
    """Count a worker that gave no whole answer; whether it is left alone from now on."""
    kind = "timeout" if isinstance(error, EngineTimeoutError) else "lost"
    parts.metrics.upstream_failed(worker, kind)
    return parts.chooser.breakers.failed(worker)


def _headers(response: Answer, passage: Passage) -> RawHeaders:
    """The engine's headers, less those of its connection, and what this gateway has to say."""
    target, observation = passage.target, passage.observation
    assert target is not None
    route = observation.route
    headers = [(n, v) for n, v in response.headers if n.lower() not in NOT_RETURNED]
    headers += (
        (b"x-request-id", observation.request_id.encode()),
        (b"x-introvert-expert", target.label.encode()),
        (b"x-introvert-expert-version", (target.version or "none").encode()),
        (b"x-introvert-worker", observation.worker.encode()),
        (b"x-introvert-route-score", b"%.4f" % route.score if route else b"nan"),
        (b"x-introvert-route-ms", b"%.3f" % (observation.route_s * 1000)),
    )
    if observation.spill and route is not None and route.expert is not None:
        headers += (
            (b"x-introvert-spill", observation.spill.encode()),
            (b"x-introvert-routed-expert", route.expert.encode()),
        )
    return headers
