"""The endpoints that the gateway answers itself."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from configs.errors import IntrovertError
from server.gateway.app import create_app
from server.gateway.routing import LoadedRouter
from tests.server.gateway.conftest import (
    BASE,
    LAW,
    SPORT,
    FakeRouter,
    FakeTables,
    House,
    StartGateway,
    chat,
    make_config,
    make_table,
    make_worker,
    refuse,
)


async def test_models_through_the_official_client(house: House) -> None:
    models = [model async for model in house.gateway.openai().models.list()]
    assert [model.id for model in models] == ["introvert", BASE, "expert-0000", "expert-0001"]
    expert: dict[str, Any] = models[2].model_dump()
    assert expert["version"] == "aaaaaaaaaaaa"
    assert expert["ready"]
    assert expert["workers"] == ["worker-0"]


@pytest.mark.parametrize("name", ["introvert", BASE, "expert-0001", LAW])
async def test_one_model(house: House, name: str) -> None:
    model = await house.gateway.openai().models.retrieve(name)
    assert model.id == name.partition("@")[0]


async def test_one_model_that_is_not_there(house: House) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await house.gateway.openai().models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


async def test_a_model_that_is_not_ready_says_so(house: House) -> None:
    await house.gateway.uses(make_table(2, make_worker(1, house.law.url, [LAW])))
    _, models, _ = await house.gateway.get("/v1/models")
    assert {model["id"]: model["ready"] for model in models["data"]} == {
        "introvert": True,
        BASE: True,
        "expert-0000": False,
        "expert-0001": True,
    }


async def test_ready_waits_for_every_expert_once(house: House, start_gateway: StartGateway) -> None:
    sport, law = make_worker(0, house.sport.url, [SPORT]), make_worker(1, house.law.url, [LAW])
    starting = make_worker(1, None, [], state="starting", detail="loading the base")
    gateway = await start_gateway()
    status, answer, headers = await gateway.get("/ready")
    assert (status, answer["ready"], answer["experts_total"]) == (503, False, 0)
    assert headers["retry-after"] == "1"

    await gateway.uses(make_table(1, sport, starting))
    status, answer, _ = await gateway.get("/ready")
    assert (status, answer["ready"]) == (503, False)
    assert (answer["experts_ready"], answer["experts_total"]) == (1, 2)
    assert answer["missing"] == [LAW]

    await gateway.uses(make_table(2, sport, law))
    status, answer, _ = await gateway.get("/ready")
    assert (status, answer["ready"], answer["degraded"], answer["detail"]) == (200, True, False, "")

    await gateway.uses(make_table(3, sport, law.model_copy(update={"state": "down"})))
    status, answer, _ = await gateway.get("/ready")
    assert (status, answer["ready"], answer["degraded"]) == (200, True, True)
    assert answer["missing"] == [LAW]

    await gateway.uses(
        make_table(4, *(w.model_copy(update={"state": "down"}) for w in (sport, law)))
    )
    status, answer, _ = await gateway.get("/ready")
    assert (status, answer["ready"]) == (503, False)
    assert "no worker is ready" in answer["detail"]


async def test_an_expert_that_its_workers_refused(
    house: House, start_gateway: StartGateway
) -> None:
    sport, law = make_worker(0, house.sport.url, [SPORT]), make_worker(1, house.law.url, [LAW])
    gateway = await start_gateway(refuse(make_table(1, sport, law), LAW))
    status, _, headers = await gateway.post("/v1/chat/completions", chat("introvert", "law"))
    assert (status, headers["x-introvert-expert"]) == (200, "base")
    _, explained, _ = await gateway.post("/v1/route", {"input": "law"})
    (route,) = explained["data"]
    assert (route["expert"], route["model"]) == (None, BASE)
    assert not route["candidates"][0]["served"]

    status, answer, headers = await gateway.post("/v1/chat/completions", chat("expert-0001"))
    assert (status, answer["error"]["code"]) == (503, "no_engine")
    assert f"'{LAW}' was refused by its workers (worker-1)" in answer["error"]["message"]
    assert headers["retry-after"] == "1"

    status, answer, _ = await gateway.get("/ready")
    assert (status, answer["degraded"], answer["missing"]) == (200, True, [LAW])
    assert (answer["experts_ready"], answer["experts_total"]) == (1, 2)
    assert "refused by their workers" in answer["detail"]

    starting = law.model_copy(update={"state": "starting"})
    await gateway.uses(make_table(9, sport, starting))
    status, _, headers = await gateway.post("/v1/chat/completions", chat("introvert", "law"))
    assert (status, headers["x-introvert-spill"]) == (200, "base")
    assert headers["x-introvert-routed-expert"] == "expert-0001"


async def test_while_the_router_loads_explicit_models_are_answered(
    house: House, start_gateway: StartGateway
) -> None:
    loaded = threading.Event()

    def loads(place: str) -> LoadedRouter:
        assert loaded.wait(60)
        return LoadedRouter(FakeRouter(), "cccccccccccc")

    table = make_table(
        1, make_worker(0, house.sport.url, [SPORT]), make_worker(1, house.law.url, [LAW])
    )
    gateway = await start_gateway(table, router=loads, queue_timeout_s=0.2)
    try:
        status, answer, headers = await gateway.post("/v1/chat/completions", chat("introvert"))
        assert (status, answer["error"]["code"]) == (503, "router_not_ready")
        assert headers["retry-after"] == "1"
        status, _, _ = await gateway.post("/v1/chat/completions", chat("expert-0000"))
        assert status == 200
        status, answer, _ = await gateway.get("/ready")
        assert (status, answer["router"]) == (503, "loading")
    finally:
        loaded.set()
    await gateway.until("/ready", lambda answer: answer["ready"])
    status, _, _ = await gateway.post("/v1/chat/completions", chat("introvert"))
    assert status == 200


async def test_a_router_that_cannot_be_loaded_is_told(
    house: House, start_gateway: StartGateway
) -> None:
    def fails(place: str) -> LoadedRouter:
        raise IntrovertError("the bundle is gone; publish it again")

    gateway = await start_gateway(make_table(1, make_worker(0, house.sport.url, [])), router=fails)
    answer = await gateway.until("/ready", lambda answer: answer["router"] == "failed")
    assert not answer["ready"]
    assert "publish it again" in answer["detail"]


async def test_a_table_of_another_bundle_stops_routing_alone(house: House) -> None:
    workers = make_worker(0, house.sport.url, [SPORT]), make_worker(1, house.law.url, [LAW])
    await house.gateway.uses(make_table(2, *workers, bundle="dddddddddddd"))
    await house.gateway.until("/ready", lambda answer: answer["router"] == "mismatched")
    for path, body in (
        ("/v1/chat/completions", chat("introvert", "sport")),
        ("/v1/route", {"input": "sport"}),
    ):
        status, answer, headers = await house.gateway.post(path, body)
        assert (status, answer["error"]["code"]) == (503, "router_not_ready")
        assert headers["retry-after"] == "1"
        for part in ("cccccccccccc", "dddddddddddd", "restart `introvert serve`"):
            assert part in answer["error"]["message"]
    status, _, headers = await house.gateway.post("/v1/chat/completions", chat("expert-0000"))
    assert (status, headers["x-introvert-expert"]) == (200, "expert-0000")
    status, answer, _ = await house.gateway.get("/ready")
    assert (status, answer["router"], answer["degraded"]) == (503, "mismatched", True)
    assert "dddddddddddd" in answer["detail"]
    status, answer, _ = await house.gateway.get("/v1/models/introvert")
    assert not answer["ready"]

    await house.gateway.uses(make_table(3, *workers))
    assert (await house.gateway.get("/ready"))[0] == 200
    assert (await house.gateway.post("/v1/route", {"input": "sport"}))[0] == 200


async def test_route_explains_and_generates_nothing(house: House) -> None:
    status, answer, _ = await house.gateway.post("/v1/route", {"input": ["sport", "unserved", "?"]})
    assert status == 200
    sport, unserved, nothing = answer["data"]
    assert sport == {
        "expert": "expert-0000",
        "model": SPORT,
        "cluster": 0,
        "score": 0.75,
        "margin": 0.25,
        "abstained": False,
        "allowed": True,
        "threshold": 0.25,
        "by": "embedder",
        "workers": ["worker-0"],
        "candidates": [
            {
                "expert": "expert-0000",
                "score": 0.75,
                "served": True,
                "allowed": True,
                "workers": ["worker-0"],
            },
            {
                "expert": "expert-0001",
                "score": 0.5,
                "served": True,
                "allowed": True,
                "workers": ["worker-1"],
            },
        ],
    }
    assert (unserved["expert"], unserved["model"], unserved["abstained"]) == (None, BASE, False)
    assert unserved["candidates"][0]["served"] is False
    assert (nothing["expert"], nothing["model"], nothing["abstained"]) == (None, BASE, True)
    assert nothing["workers"] == ["worker-0", "worker-1"]
    assert not house.sport.seen
    assert not house.law.seen


async def test_route_takes_a_chat(house: House) -> None:
    _, answer, _ = await house.gateway.post(
        "/v1/route", {"messages": [{"role": "user", "content": [{"type": "text", "text": "law"}]}]}
    )
    assert [route["expert"] for route in answer["data"]] == ["expert-0001"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_type", None),
        ({"input": "a", "messages": []}, "invalid_type", None),
        ({"input": 3}, "invalid_type", "input"),
        ({"input": ["a"] * 257}, "invalid_type", "input"),
        ({"text": "a"}, "invalid_type", "text"),
        ({"messages": [{}]}, "unroutable", "messages[0].role"),
        ({"messages": [{"role": "user", "content": " "}]}, "unroutable", "messages"),
        ({"input": ["a", ""]}, "unroutable", "input"),
        (b"nonsense", "invalid_json", None),
        (b'{"input":1e999}', "invalid_type", "input"),
    ],
)
async def test_route_refuses(house: House, body: Any, code: str, param: str | None) -> None:
    status, answer, _ = await house.gateway.post("/v1/route", body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, param)


async def test_a_client_that_hangs_up_while_it_sends_is_no_defect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = create_app(make_config(), FakeTables(), lambda _: LoadedRouter(FakeRouter(), "c"))
    received = iter(
        [
            {"type": "http.request", "body": b'{"inp', "more_body": True},
            {"type": "http.disconnect"},
        ]
    )
    sent: list[Any] = []

    async def receive() -> Any:
        return next(received)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/route", "headers": []}
    await app({**scope, "query_string": b"", "scheme": "http"}, receive, send)
    assert sent[0]["status"] == 499
    assert not caplog.records


async def test_limits_hold_for_what_the_gateway_answers_itself(
    house: House, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(max_header_bytes=2048, max_prompt_bytes=1024)
    for path in ("/health", "/v1/models", "/admin/status"):
        async with gateway.http.get(gateway.url + path, headers={"a": "b" * 4096}) as answer:
            assert answer.status == 431
            assert (await answer.json())["error"]["code"] == "headers_too_large"
    status, answer, _ = await gateway.post("/v1/route", {"input": "a" * 2048})
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


async def test_health_needs_nothing(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    assert (await gateway.get("/health"))[:2] == (200, {"status": "ok"})
    assert (await gateway.get("/v1/models"))[0] == 503


async def test_status_shows_the_table_and_what_is_in_flight(house: House) -> None:
    house.sport.behaviour = "wait"
    asking = asyncio.create_task(house.gateway.post("/v1/chat/completions", chat("expert-0000")))
    try:
        await asyncio.wait_for(house.sport.arrived.wait(), 60)
        _, status, _ = await house.gateway.get("/admin/status")
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert status["in_flight"]["worker-0"] == 1
    assert status["table"]["workers"][0]["devices"] == "cores:0"
    assert status["router"] == {"state": "ready", "bundle": "cccccccccccc", "detail": ""}


async def test_metrics_parse_and_count(house: House) -> None:
    await house.gateway.post("/v1/chat/completions", chat("introvert", "law"))
    await house.gateway.post("/v1/chat/completions", chat("introvert", "?"))
    await house.gateway.post("/v1/chat/completions", chat("no such model " * 10))
    async with house.gateway.http.get(f"{house.gateway.url}/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain")
        text = await response.text()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    requests = families["introvert_gateway_requests"].samples
    counted = {
        (s.labels["expert"], s.labels["worker"], s.labels["status"]): s.value
        for s in requests
        if s.name.endswith("_total")
    }
    assert counted.pop(("expert-0001", "worker-1", "200")) == 1
    assert counted.pop(("none", "none", "404")) == 1
    (((expert, _, status), value),) = counted.items()
    assert (expert, status, value) == ("base", "200", 1)
    assert "no such model" not in text
    values = {s.name: s.value for f in families.values() for s in f.samples if not s.labels}
    assert values["introvert_gateway_abstentions_total"] == 1
    assert values["introvert_gateway_route_seconds_count"] == 2
    assert values["introvert_gateway_forward_overhead_seconds_count"] == 2
    assert values["introvert_gateway_forward_overhead_seconds_sum"] > 0
    assert values["introvert_gateway_upstream_first_byte_seconds_count"] == 2
    assert values["introvert_gateway_table_version"] == 1
    assert values["introvert_gateway_ready_experts"] == 2


async def test_unknown_paths_and_methods(house: House) -> None:
    status, answer, _ = await house.gateway.get("/v1/nothing")
    assert (status, answer["error"]["code"]) == (404, "unknown_url")
    for path, allow in (("/v1/chat/completions", "POST"), ("/v1/route", "POST")):
        status, answer, headers = await house.gateway.get(path)
        assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
        assert headers["allow"] == allow
    status, _, headers = await house.gateway.post("/health", {})
    assert (status, headers["allow"]) == (405, "GET")


async def test_the_openapi_document_describes_every_route(house: House) -> None:
    _, document, _ = await house.gateway.get("/openapi.json")
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/route",
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/cancel",
        "/health",
        "/ready",
        "/metrics",
        "/metrics/engines",
        "/admin/status",
        "/admin/bundle",
        "/admin/bundle/promote",
        "/admin/bundle/abort",
    }
    forwarded = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "403", "404", "413", "429", "503"} <= set(forwarded["responses"])
    assert "text/event-stream" in forwarded["responses"]["200"]["content"]
    body = forwarded["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", "messages"]
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "HTTPValidationError" not in str(operation), "validation answers with 400 here"
            assert {"400", "408", "431", "500"} <= set(operation["responses"])
