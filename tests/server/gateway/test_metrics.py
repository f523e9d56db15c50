"""What is counted of a request."""

from __future__ import annotations

from typing import Any

import pytest

from router.types import Route
from server.gateway import metrics as metrics_module
from server.gateway.metrics import MAX_REASONS, Metrics
from server.gateway.observation import Observation
from server.gateway.recorder import RequestRecorder
from tests.server.gateway.test_tallies import samples

G = "introvert_gateway_"
ROUTE = Route("expert-0001", 1, 0.75, 0.25, False, ())


def observed(*requests: dict[str, Any]) -> dict[tuple[str, ...], float]:
    metrics = Metrics()
    recorder = RequestRecorder(metrics)
    for fields in requests:
        request = Observation(**fields)
        recorder.began(request)
        recorder.ended(request)
    return samples(metrics.snapshot())


def test_a_routed_request_is_counted_by_expert_and_by_worker() -> None:
    read = observed(
        {
            "endpoint": "/v1/completions",
            "tenant": "alice",
            "expert": "expert-0002",
            "worker": "worker-3",
            "route": ROUTE,
            "routed_by": "student",
            "spill": "runner-up",
            "cold": True,
            "status": 200,
            "began": 5.0,
            "ended": 6.5,
            "route_s": 0.25,
            "queue_s": 0.5,
            "engine_s": 0.125,
            "overhead_s": 0.0001,
            "retries": 2,
            "prompt_tokens": 7,
            "output_tokens": 9,
        }
    )
    expected = {
        ("requests_total", "/v1/completions", "expert-0002", "200", "worker-3"): 1,
        ("request_seconds_sum", "/v1/completions"): 1.5,
        ("routes_total", "student"): 1,
        ("route_seconds_sum",): 0.25,
        ("abstentions_total",): 0,
        ("retries_total",): 2,
        ("expert_requests_total", "expert-0002"): 1,
        ("expert_queue_seconds_total", "expert-0002"): 0.5,
        ("expert_first_byte_seconds_total", "expert-0002"): 0.125,
        ("prompt_tokens_total", "expert-0002"): 7,
        ("output_tokens_total", "expert-0002"): 9,
        ("cold_loads_total", "expert-0002"): 1,
        ("spills_total", "expert-0001", "runner-up"): 1,
        ("worker_requests_total", "worker-3"): 1,
        ("worker_queue_seconds_sum", "worker-3"): 0.5,
        ("worker_first_byte_seconds_sum", "worker-3"): 0.125,
        ("upstream_first_byte_seconds_sum",): 0.125,
        ("worker_output_tokens_total", "worker-3"): 9,
        ("worker_cold_loads_total", "worker-3"): 1,
        ("forward_overhead_seconds_sum",): 0.0001,
        ("tenant_requests_total", "200", "alice"): 1,
        ("tenant_tokens_total", "prompt", "alice"): 7,
        ("tenant_tokens_total", "output", "alice"): 9,
    }
    assert {key: read.get((G + key[0], *key[1:])) for key in expected} == expected


def test_a_refusal_is_counted_by_its_reason_and_for_no_expert() -> None:
    read = observed({"endpoint": "/v1/messages", "status": 429, "error": "rate_limit_exceeded"})
    assert read[f"{G}rejected_total", "rate_limit_exceeded"] == 1
    assert read[f"{G}requests_total", "/v1/messages", "none", "429", "none"] == 1
    assert not [key for key in read if key[0].startswith((f"{G}expert_", f"{G}worker_"))]
    assert (f"{G}request_seconds_count", "/v1/messages") not in read, "its body never came"


def test_abstentions() -> None:
    abstained = Route(None, 0, 0.1, 0.0, True, ())
    read = observed({"route": abstained, "routed_by": "embedder", "expert": "base"})
    assert read[f"{G}abstentions_total",] == 1
    assert read[f"{G}routes_total", "embedder"] == 1


def test_reasons_are_bounded() -> None:
    read = observed(*({"error": f"code-{n}", "status": 400} for n in range(MAX_REASONS + 10)))
    reasons = {key[1]: value for key, value in read.items() if key[0] == f"{G}rejected_total"}
    assert len(reasons) == MAX_REASONS + 1
    assert reasons["other"] == 10


def test_experts_that_move_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "MAX_PAIRS", 2)
    read = observed(
        *({"expert": "a", "worker": f"w{n}", "status": 200} for n in (0, 1, 2, 3, 0)),
    )
    requests = {key[4]: value for key, value in read.items() if key[0] == f"{G}requests_total"}
    assert requests == {"w0": 2, "w1": 1, "other": 2}
