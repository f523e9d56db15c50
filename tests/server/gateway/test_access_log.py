"""The access log."""

from __future__ import annotations

import json
import os

import pytest

from router.types import Route
from server.gateway import access_log
from server.gateway.access_log import AccessLog, line_of
from server.gateway.observation import Observation

REQUEST = Observation(
    endpoint="/v1/completions",
    request_id="r1",
    expert="expert-0001",
    worker="worker-0",
    route=Route("expert-0001", 1, 0.123456, 0.25, False, ()),
    routed_by="student",
    status=200,
    began=1.0,
    ended=1.25,
    route_s=0.001,
    engine_s=0.2,
    overhead_s=0.0005,
    output_tokens=3,
)


def test_a_line_says_what_is_known_and_nothing_else() -> None:
    assert line_of(REQUEST, 0.0) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "info",
        "logger": "server.gateway.access",
        "request_id": "r1",
        "endpoint": "/v1/completions",
        "status": 200,
        "expert": "expert-0001",
        "worker": "worker-0",
        "routed_by": "student",
        "route_score": 0.1235,
        "abstained": False,
        "streamed": False,
        "output_tokens": 3,
        "total_ms": 250.0,
        "route_ms": 1.0,
        "queue_ms": 0.0,
        "engine_ms": 200.0,
        "overhead_ms": 0.5,
    }
    refused = line_of(Observation(status=401, error="invalid_api_key"), 0.0)
    assert refused["error"] == "invalid_api_key"
    assert "total_ms" not in refused


def test_lines_are_written_beside_the_loop_and_those_beyond_the_bound_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(access_log, "WRITE_INTERVAL_S", 3600)
    monkeypatch.setattr(access_log, "MAX_WAITING", 2)
    reading, writing = os.pipe()
    try:
        log = AccessLog(writing)
        for _ in range(5):
            log.began(REQUEST)
            log.ended(REQUEST)
        log.close()
        lines = os.read(reading, 65536).decode().splitlines()
    finally:
        os.close(reading)
        os.close(writing)
    assert [json.loads(line).get("request_id") for line in lines] == ["r1", "r1", None]
    assert "3 requests are not in the access log" in lines[-1]


def test_a_reader_that_has_gone_stops_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        log = AccessLog(writing)
        log.ended(REQUEST)
        log.close()
        log.ended(REQUEST)
    finally:
        os.close(writing)
