"""Requests as OpenTelemetry traces: imported only where `gateway.otlp_endpoint` is set.

A span for the request, and below it one each for routing, queueing and the engine, made at the
request's end from the times that were observed. The caller's W3C trace context is gone on with, and
the engine gets the request's. Spans are exported in batches by the SDK's own thread.
"""

from __future__ import annotations

import random
import threading
import time
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.gateway.observation import Observation

EXPORT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 3.0
TRACES_PATH = "/v1/traces"
"""Where collectors take traces (OTLP over HTTP), if the URL has no path of its own."""
CALLER, STATE = "traceparent", "tracestate"


class Traces:
    """Makes traces; see `server.gateway.observation.Recorder`."""

    def __init__(
        self,
        endpoint: str,
        *,
        share: float,
        version: str,
        process: int,
        exporter: SpanExporter | None = None,
    ) -> None:
        """Begin to export.

        Args:
            endpoint: the collector's URL.
            share: of the requests whose caller says nothing, those that are traced.
            version: of this software.
            process: number of the gateway process.
            exporter: default: OTLP over HTTP to the endpoint.
        """
        resource = Resource.create(
            {
                "service.name": "introvert-gateway",
                "service.version": version,
                "service.instance.id": str(process),
            }
        )
        self._provider = TracerProvider(resource=resource)
        made = exporter or OTLPSpanExporter(traces_url(endpoint), timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(made))
        self._tracer = self._provider.get_tracer("introvert", version)
        self._propagator = TraceContextTextMapPropagator()
        self._share = share
        self._random = random.Random()

    def began(self, observation: Observation) -> None:
        """Decide whether the request is traced; if so, the engine is told of its trace."""
        headers = observation.trace_headers
        if CALLER in headers:
            context = self._caller(headers[CALLER], headers.get(STATE))
            if context is None:
                return
        elif self._random.random() < self._share:
            context = Context()
        else:
            return
        span = self._tracer.start_span(
            f"POST {observation.endpoint}", context, kind=SpanKind.SERVER
        )
        observation.trace = span
        self._propagator.inject(headers, set_span_in_context(span, context))

    def ended(self, observation: Observation) -> None:
        """Complete the request's trace."""
        span = observation.trace
        if span is None:
            return
        # moments are on the performance counter, spans are in the wall clock's time
        offset = time.time_ns() - round(time.perf_counter() * 1e9)
        end = round(observation.ended * 1e9) + offset
        if observation.began:
            self._parts(span, observation, round(observation.began * 1e9) + offset)
        span.set_attributes(_attributes(observation))
        if observation.status >= 500:
            span.set_status(Status(StatusCode.ERROR, observation.error or None))
        span.end(end)

    def close(self) -> None:
        """Export what waits, for a moment at most: a collector that is away holds up no end."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    def _caller(self, caller: str, state: str | None) -> Context | None:
        """The caller's context; none where the caller does not trace the request itself."""
        carrier = {CALLER: caller, STATE: state} if state else {CALLER: caller}
        context = self._propagator.extract(carrier, Context())
        span = get_current_span(context).get_span_context()
        if not span.is_valid:
            return Context() if self._random.random() < self._share else None
        return context if span.trace_flags.sampled else None

    def _parts(self, span: Span, request: Observation, began: int) -> None:
        """The spans below a request's, one after the other."""
        context = set_span_in_context(span)
        for name, seconds, kind in (
            ("route", request.route_s if request.route else 0.0, SpanKind.INTERNAL),
            ("queue", request.queue_s, SpanKind.INTERNAL),
            ("engine", request.engine_s, SpanKind.CLIENT),
        ):
            if seconds <= 0:
                continue
            part = self._tracer.start_span(name, context, kind=kind, start_time=began)
            began += round(seconds * 1e9)
            part.end(began)


def traces_url(endpoint: str) -> str:
    """Where a collector takes traces."""
    has_path = urlsplit(endpoint).path.strip("/")
    return endpoint if has_path else endpoint.rstrip("/") + TRACES_PATH


def _attributes(request: Observation) -> dict[str, str | int | float | bool]:
    """What a span says of its request, by the names of OpenTelemetry's conventions where there
    are any."""
    attributes: dict[str, str | int | float | bool | None] = {
        "http.request.method": "POST",
        "http.route": request.endpoint,
        "http.response.status_code": request.status,
        "error.type": request.error,
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.output_tokens,
        "introvert.request_id": request.request_id,
        "introvert.tenant": request.tenant,
        "introvert.bundle": request.bundle,
        "introvert.expert": request.expert,
        "introvert.expert_version": request.expert_version,
        "introvert.worker": request.worker,
        "introvert.routed_by": request.routed_by,
        "introvert.route_score": request.route.score if request.route else None,
        "introvert.spill": request.spill,
        "introvert.cold": request.cold or None,
        "introvert.retries": request.retries or None,
    }
    return {name: value for name, value in attributes.items() if value is not None and value != ""}
