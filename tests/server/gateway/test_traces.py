"""OpenTelemetry traces."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from multidict import CIMultiDict
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from router.types import Route
from server.gateway.observation import Observation
from server.gateway.traces import Traces, traces_url

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{}"


class Traced:
    """Traces into memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self._made: list[Traces] = []

    def traces(self, share: float) -> Traces:
        made = Traces("http://x", share=share, version="1", process=0, exporter=self.exporter)
        self._made.append(made)
        return made

    def spans(self) -> dict[str, ReadableSpan]:
        self.close()
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def close(self) -> None:
        while self._made:
            self._made.pop().close()


@pytest.fixture
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    made.close()


def request(**headers: str) -> Observation:
    return Observation(endpoint="/v1/completions", trace_headers=CIMultiDict(headers))


def finish(traces: Traces, observation: Observation, **fields: object) -> None:
    traces.began(observation)
    observation.began = time.perf_counter()
    observation.status = 200
    for name, value in fields.items():
        setattr(observation, name, value)
    observation.ended = observation.began + 1.0
    traces.ended(observation)


def test_a_request_and_its_parts(traced: Traced) -> None:
    observation = request(traceparent=CALLER.format("01"))
    finish(
        traced.traces(0.0),
        observation,
        route=Route("expert-0001", 1, 0.5, 0.1, False, ()),
        route_s=0.25,
        queue_s=0.5,
        engine_s=0.125,
        expert="expert-0001",
        status=503,
        error="engine_lost",
    )
    spans = traced.spans()
    assert set(spans) == {"POST /v1/completions", "route", "queue", "engine"}
    whole = spans["POST /v1/completions"]
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    assert whole.attributes is not None
    assert whole.attributes["introvert.expert"] == "expert-0001"
    assert whole.status.status_code is StatusCode.ERROR
    for name, seconds in (("route", 0.25), ("queue", 0.5), ("engine", 0.125)):
        part = spans[name]
        assert part.parent is not None
        assert part.parent.span_id == whole.context.span_id
        assert part.start_time is not None
        assert part.end_time is not None
        assert part.end_time - part.start_time == round(seconds * 1e9)
    assert spans["route"].end_time == spans["queue"].start_time
    # the engine goes on from the request's span
    _, trace, parent, flags = observation.trace_headers["traceparent"].split("-")
    assert trace == "0af7651916cd43dd8448eb211c80319c"
    assert parent == f"{whole.context.span_id:016x}"
    assert flags == "01"


def test_which_requests_are_traced(traced: Traced) -> None:
    nobody, everybody = traced.traces(0.0), traced.traces(1.0)
    untraced = request(traceparent=CALLER.format("00"))
    finish(everybody, untraced)
    assert untraced.trace_headers["traceparent"] == CALLER.format("00"), "passed on as it came"
    finish(nobody, request())
    finish(nobody, request(traceparent="nonsense"))
    assert traced.exporter.get_finished_spans() == ()
    own = request()
    finish(everybody, own)
    assert "traceparent" in own.trace_headers
    assert len(traced.spans()) == 1


def test_where_collectors_take_traces() -> None:
    assert traces_url("http://c:4318") == traces_url("http://c:4318/") == "http://c:4318/v1/traces"
    assert traces_url("http://c/otlp/v1/traces") == "http://c/otlp/v1/traces"


def test_it_is_imported_only_where_configured() -> None:
    code = (
        "import sys, server.gateway.app\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
