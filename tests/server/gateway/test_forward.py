"""Requests through the real gateway, over real sockets, to fake engines."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from typing import Any

import openai
import pytest

from server.gateway.client import Lifeline
from server.gateway.protocol import ENDPOINTS
from tests.server.gateway.conftest import (
    BASE,
    LAW,
    SPORT,
    FakeEngine,
    Gateway,
    House,
    StartEngine,
    StartGateway,
    chat,
    make_table,
    make_worker,
)

CHAT = "/v1/chat/completions"
REQUESTS = "introvert_gateway_requests_total"


@pytest.mark.parametrize(
    ("model", "text", "answers"),
    [
        ("expert-0000", "law", SPORT),
        (LAW, "sport", LAW),
        (BASE, "sport", BASE),
        ("introvert", "a sport", SPORT),
        ("introvert", "the law", LAW),
        ("introvert", "anything else", BASE),
        ("introvert", "an unserved topic", BASE),
    ],
)
async def test_the_model_name_decides_who_answers(
    house: House, model: str, text: str, answers: str
) -> None:
    answer = await house.gateway.openai().chat.completions.create(**chat(model, text))
    assert answer.model == answers
    assert answer.choices[0].message.content == f"by {answers}"


async def test_headers_tell_who_answered(house: House) -> None:
    status, _, headers = await house.gateway.post(CHAT, chat("introvert", "sport"))
    assert status == 200
    assert headers["x-introvert-expert"] == "expert-0000"
    assert headers["x-introvert-expert-version"] == "aaaaaaaaaaaa"
    assert headers["x-introvert-worker"] == "worker-0"
    assert headers["x-introvert-route-score"] == "0.7500"
    assert 0 < float(headers["x-introvert-route-ms"]) < 1000
    assert headers["x-engine"] == "sport"
    assert len(headers.getall("date")) == 1


async def test_headers_of_an_explicit_model_and_of_an_abstention(house: House) -> None:
    _, _, headers = await house.gateway.post(CHAT, chat("expert-0001"))
    assert headers["x-introvert-route-score"] == "nan"
    assert headers["x-introvert-route-ms"] == "0.000"
    _, _, headers = await house.gateway.post(CHAT, chat("introvert", "gibberish"))
    assert headers["x-introvert-expert"] == "base"
    assert headers["x-introvert-expert-version"] == "none"
    assert headers["x-introvert-route-score"] == "0.1250"


async def test_completions_through_the_official_client(house: House) -> None:
    client = house.gateway.openai()
    whole = await client.completions.create(model="introvert", prompt="a law")
    assert whole.choices[0].text == f"by {LAW}"
    stream = await client.completions.create(model="introvert", prompt="a sport", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "t0 t1 t2 "


async def test_chat_stream_through_the_official_client(house: House) -> None:
    stream = await house.gateway.openai().chat.completions.create(
        **chat("introvert", "law", stream=True)
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {LAW}
    assert len(chunks) == house.law.tokens


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
async def test_every_endpoint_is_routed_and_forwarded(house: House, endpoint: Any) -> None:
    field = endpoint.routed_fields[0]
    prompt = [{"role": "user", "content": "law"}] if field == "messages" else "law"
    status, _, _ = await house.gateway.post(endpoint.path, {"model": "introvert", field: prompt})
    assert status == 200
    assert house.law.seen[-1].path == endpoint.path
    assert house.law.seen[-1].json == {"model": LAW, field: prompt}


async def test_only_the_model_changes_in_the_body(house: House) -> None:
    body = (
        b'{ "messages" : [ {"role":"user","content":"\\u00e4 \xc3\xa4 1"} ],"model":"expert-0000", '
    )
    body += b'"temperature":0.70 ,"seed":12345678901234567890, "logit_bias":{"5": -1E2} }'
    await house.gateway.post(CHAT, body)
    assert house.sport.seen[-1].body == (
        b'{"messages":[ {"role":"user","content":"\\u00e4 \xc3\xa4 1"} ],"model":"' + SPORT.encode()
        + b'","temperature":0.70,"seed":12345678901234567890,"logit_bias":{"5": -1E2}}'
    )  # fmt: skip


async def test_events_pass_byte_for_byte(house: House) -> None:
    async with house.gateway.http.post(
        house.gateway.url + CHAT, json=chat("expert-0000", stream=True)
    ) as through:
        assert through.headers["content-type"] == "text/event-stream; charset=utf-8"
        passed = await through.read()
    async with house.gateway.http.post(
        house.sport.url + CHAT, json=chat(SPORT, stream=True)
    ) as direct:
        assert passed == await direct.read()


async def test_events_are_not_held_back(house: House) -> None:
    house.sport.tokens, house.sport.token_delay_s = 2, 30
    stream = await house.gateway.openai().chat.completions.create(
        **chat("expert-0000", stream=True)
    )
    async with asyncio.timeout(20):  # the next token comes after 30 s
        assert (await anext(aiter(stream))).choices[0].delta.content == "t0 "
    await stream.close()


async def test_request_id_is_kept_or_made(house: House) -> None:
    _, _, headers = await house.gateway.post(
        CHAT, chat("expert-0000"), headers={"x-request-id": "mine-1"}
    )
    assert headers["x-request-id"] == "mine-1"
    assert house.sport.seen[-1].headers["x-request-id"] == "mine-1"
    _, _, headers = await house.gateway.post(
        CHAT, chat("expert-0000"), headers={"x-request-id": "has spaces"}
    )
    assert len(headers["x-request-id"]) == 32
    _, _, headers = await house.gateway.post(CHAT, b"{")
    assert len(headers["x-request-id"]) == 32


async def test_headers_of_the_connection_and_credentials_stay_here(house: House) -> None:
    await house.gateway.post(
        CHAT,
        chat("expert-0000"),
        headers={
            "authorization": "Bearer secret",
            "cookie": "a=b",
            "connection": "keep-alive, x-hop",
            "x-hop": "1",
            "content-type": "text/plain",
            "traceparent": "00-1-2-3",
        },
    )
    seen = house.sport.seen[-1].headers
    assert not {"authorization", "cookie", "x-hop"} & seen.keys()
    assert seen["content-type"] == "application/json"
    assert seen["traceparent"] == "00-1-2-3"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_json", None),
        (b"", 400, "invalid_json", None),
        (b'{"model": "\xff"}', 400, "invalid_json", None),
        (b"[]", 400, "invalid_type", None),
        ({}, 400, "missing_required_parameter", "model"),
        ({"model": 7}, 400, "invalid_type", "model"),
        ({"model": "expert-0000@dddddddddddd"}, 404, "model_not_found", "model"),
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"model": "introvert"}, 400, "unroutable", "messages"),
        ({"model": "introvert", "messages": "hello"}, 400, "unroutable", "messages"),
        ({"model": "introvert", "messages": [{"role": "user"}]}, 400, "unroutable", "messages"),
        (b'{"model":"introvert","messages":[1e999]}', 400, "invalid_type", "messages"),
        (chat("expert-0000", "x" * 70_000), 413, "request_too_large", None),
    ],
)
async def test_refusals(house: House, body: Any, status: int, code: str, param: str | None) -> None:
    got, answer, headers = await house.gateway.post(CHAT, body)
    assert (got, answer["error"]["code"], answer["error"]["param"]) == (status, code, param)
    assert answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert headers["content-type"] == "application/json"
    assert not house.sport.seen
    assert not house.law.seen


async def test_the_current_version_is_named(house: House) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await house.gateway.openai().chat.completions.create(**chat("expert-0000@dddddddddddd"))
    assert caught.value.code == "model_not_found"
    assert SPORT in caught.value.message


async def test_a_body_is_counted_while_it_comes(house: House) -> None:
    async def endless() -> Any:
        yield b'{"model":"expert-0000","messages":"'
        for _ in range(100):
            yield b"x" * 1024

    async with house.gateway.http.post(house.gateway.url + CHAT, data=endless()) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "request_too_large"


async def test_errors_of_messages_have_anthropics_shape(house: House) -> None:
    status, answer, _ = await house.gateway.post("/v1/messages", {"model": "nobody"})
    assert status == 404
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "not_found_error"


async def test_no_table_is_no_engine(start_gateway: StartGateway) -> None:
    gateway: Gateway = await start_gateway()
    for model in ("expert-0000", BASE, "introvert"):
        status, answer, headers = await gateway.post(CHAT, chat(model))
        assert (status, answer["error"]["code"]) == (503, "no_engine")
        assert headers["retry-after"] == "1"


async def test_an_expert_without_a_ready_home(house: House) -> None:
    await house.gateway.uses(
        make_table(
            2,
            make_worker(0, house.sport.url, [SPORT], state="down"),
            make_worker(1, house.law.url, [LAW]),
        )
    )
    with pytest.raises(openai.InternalServerError) as caught:
        await house.gateway.openai().chat.completions.create(**chat("expert-0000"))
    assert (caught.value.status_code, caught.value.code) == (503, "no_engine")
    assert caught.value.response.headers["retry-after"] == "1"
    status, _, _ = await house.gateway.post(CHAT, chat("expert-0001"))
    assert status == 200


async def test_an_engines_error_gets_our_shape(house: House) -> None:
    house.sport.behaviour = "error"
    house.sport.error = (
        400,
        {
            "error": {
                "message": "the context is 128 tokens, your prompt has at least 129",
                "type": "BadRequestError",
                "param": "input_tokens",
                "code": 400,
            }
        },
    )
    with pytest.raises(openai.BadRequestError) as caught:
        await house.gateway.openai().chat.completions.create(**chat("expert-0000"))
    assert caught.value.code == "context_length_exceeded"
    assert "129" in caught.value.message
    assert caught.value.response.headers["x-introvert-worker"] == "worker-0"


async def test_an_engine_that_dies_before_it_answers(house: House) -> None:
    house.sport.behaviour = "die"
    status, answer, headers = await house.gateway.post(CHAT, chat("expert-0000"))
    assert (status, answer["error"]["code"]) == (503, "engine_lost")
    assert headers["retry-after"] == "1"
    errors = 'introvert_gateway_upstream_errors_total{kind="lost",worker="worker-0"}'
    assert await house.gateway.metric(errors) == 2, "for want of another it was asked once more"


async def test_an_engine_that_dies_within_a_body(house: House) -> None:
    house.sport.behaviour = "die_in_body"
    status, answer, _ = await house.gateway.post(CHAT, chat("expert-0000"))
    assert (status, answer["error"]["code"]) == (503, "engine_lost")


@pytest.mark.parametrize("behaviour", ["die_in_stream", "die_in_event"])
async def test_an_engine_that_dies_within_a_stream(house: House, behaviour: str) -> None:
    house.sport.behaviour = behaviour
    async with house.gateway.http.post(
        house.gateway.url + CHAT, json=chat("expert-0000", stream=True)
    ) as response:
        text = (await response.read()).decode()
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert len(events) == 2
    assert json.loads(events[0])["choices"]
    assert json.loads(events[1])["error"]["code"] == "engine_lost"

    stream = await house.gateway.openai().chat.completions.create(
        **chat("expert-0000", stream=True)
    )
    with pytest.raises(openai.APIError) as caught:
        [chunk async for chunk in stream]
    assert caught.value.code == "engine_lost"


async def test_a_stream_of_messages_ends_with_anthropics_error(house: House) -> None:
    house.sport.behaviour = "die_in_stream"
    body = {"model": "expert-0000", "messages": [], "stream": True}
    async with house.gateway.http.post(house.gateway.url + "/v1/messages", json=body) as response:
        last = (await response.read()).decode().rstrip("\n").rpartition("\n\n")[2]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "engine_lost"


async def test_a_silent_engine_is_given_up(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    engine = await start_engine(behaviour="wait")
    gateway = await start_gateway(
        make_table(1, make_worker(0, engine.url, [SPORT])), request_timeout_s=0.2
    )
    status, answer, _ = await gateway.post(CHAT, chat("expert-0000"))
    assert (status, answer["error"]["code"]) == (504, "engine_timeout")


async def test_another_home_is_tried_when_one_refuses(house: House, nowhere: str) -> None:
    await house.gateway.uses(
        make_table(2, make_worker(0, house.sport.url, [SPORT]), make_worker(1, nowhere, [SPORT]))
    )
    for number in range(20):
        body = chat("expert-0000", str(number))
        status, _, headers = await house.gateway.post(CHAT, body)
        assert (status, headers["x-introvert-worker"]) == (200, "worker-0")
    # The home that refused is left alone after a while, so few of the requests meet it.
    assert 1 <= await house.gateway.metric("introvert_gateway_retries_total") < 10


async def test_no_home_can_be_reached(house: House, nowhere: str) -> None:
    await house.gateway.uses(make_table(2, make_worker(0, nowhere, [SPORT])))
    status, answer, headers = await house.gateway.post(CHAT, chat("expert-0000"))
    assert (status, answer["error"]["code"]) == (503, "no_engine")
    assert headers["retry-after"] == "1"


UNKNOWN_MODEL = {
    "error": {
        "message": "The model `x` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
}
DEAD_ENGINE = {
    "error": {
        "message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
}


async def _both_hold_sport(house: House) -> None:
    await house.gateway.uses(
        make_table(
            2, make_worker(0, house.sport.url, [SPORT]), make_worker(1, house.law.url, [SPORT])
        )
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_let_the_expert_go_is_no_answer(house: House, stream: bool) -> None:
    await _both_hold_sport(house)
    house.sport.behaviour, house.sport.error = "error", (404, UNKNOWN_MODEL)
    for number in range(8):
        body = json.dumps(chat("expert-0000", str(number), stream=stream))
        async with house.gateway.http.post(house.gateway.url + CHAT, data=body) as answer:
            await answer.read()
            assert (answer.status, answer.headers["x-introvert-worker"]) == (200, "worker-1")
    assert house.sport.seen, "it has been asked"
    house.sport.behaviour = "answer"
    house.sport.seen.clear()
    for number in range(8):
        await house.gateway.post(CHAT, chat("expert-0000", str(number)))
    assert house.sport.seen, "it is not left alone for that"


async def test_an_expert_that_went_while_the_request_was_on_its_way_is_waited_for(
    house: House, start_gateway: StartGateway
) -> None:
    workers = make_worker(0, house.sport.url, [SPORT]), make_worker(1, house.law.url, [LAW])
    gateway = await start_gateway(make_table(1, *workers), queue_timeout_s=60)
    house.sport.behaviour, house.sport.error = "error", (404, UNKNOWN_MODEL)
    asked = asyncio.create_task(gateway.post(CHAT, chat("expert-0000")))
    try:
        await house.sport.arrived.wait()
        moved = make_worker(0, house.sport.url, []), make_worker(1, house.law.url, [SPORT, LAW])
        gateway.tables.publish(make_table(2, *moved))
        status, answer, headers = await asked
    finally:
        asked.cancel()
    assert (status, answer["model"], headers["x-introvert-worker"]) == (200, SPORT, "worker-1")


async def test_an_engine_that_never_has_the_expert_ends_in_no_engine(house: House) -> None:
    house.sport.behaviour, house.sport.error = "error", (404, UNKNOWN_MODEL)
    status, answer, _ = await house.gateway.post(CHAT, chat("expert-0000"))
    assert (status, answer["error"]["code"]) == (503, "no_engine")


async def test_a_dead_engine_is_left_alone_at_once(
    house: House, start_gateway: StartGateway
) -> None:
    workers = (make_worker(n, e.url, [SPORT]) for n, e in enumerate((house.sport, house.law)))
    gateway = await start_gateway(make_table(1, *workers), breaker_pause_s=600, affinity_slack=0)
    house.sport.behaviour, house.sport.error = "error", (500, DEAD_ENGINE)
    for number in range(200):
        if house.sport.seen and number >= 10:
            break
        status, _, headers = await gateway.post(CHAT, chat("expert-0000", str(number)))
        assert (status, headers["x-introvert-worker"]) == (200, "worker-1")
    assert len(house.sport.seen) == 1


async def test_a_request_that_kills_its_engine_kills_no_third_one(house: House) -> None:
    await _both_hold_sport(house)
    for engine in (house.sport, house.law):
        engine.behaviour, engine.error = "error", (500, DEAD_ENGINE)
    status, answer, _ = await house.gateway.post(CHAT, chat("expert-0000"))
    assert (status, answer["error"]["code"]) == (500, "engine_error")
    assert (len(house.sport.seen), len(house.law.seen)) == (1, 1)


@pytest.mark.parametrize("behaviour", ["die", "die_in_body"])
async def test_an_engine_that_dies_with_a_request_costs_no_answer(
    house: House, behaviour: str
) -> None:
    await _both_hold_sport(house)
    house.sport.behaviour = behaviour
    for number in range(200):
        if house.sport.seen and number >= 10:
            break
        body = chat("expert-0000", str(number))
        status, answer, headers = await house.gateway.post(CHAT, body)
        assert (status, answer["model"], headers["x-introvert-worker"]) == (200, SPORT, "worker-1")
    assert house.sport.seen, "it has been asked"


async def test_a_stream_that_has_not_begun_is_begun_elsewhere(house: House) -> None:
    await _both_hold_sport(house)
    house.sport.behaviour = "die"
    for number in range(200):
        if house.sport.seen and number >= 10:
            break
        body = chat("expert-0000", str(number), stream=True)
        async with house.gateway.http.post(house.gateway.url + CHAT, json=body) as response:
            text = await response.text()
            assert response.headers["x-introvert-worker"] == "worker-1"
        assert text.endswith("data: [DONE]\n\n")
    assert house.sport.seen, "it has been asked"


async def test_a_request_whose_engines_die_with_it_gets_no_third_one(house: House) -> None:
    await _both_hold_sport(house)
    house.sport.behaviour = house.law.behaviour = "die"
    status, answer, _ = await house.gateway.post(CHAT, chat("expert-0000"))
    assert (status, answer["error"]["code"]) == (503, "engine_lost")
    assert (len(house.sport.seen), len(house.law.seen)) == (1, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hang_up_reaches_the_engine(house: House, stream: bool) -> None:
    engine = house.sport
    if stream:
        engine.tokens, engine.token_delay_s = 1000, 0.05
    else:
        engine.behaviour = "wait"
    reader, writer = await _send_raw(house.gateway, chat("expert-0000", stream=stream))
    try:
        async with asyncio.timeout(60):
            await engine.arrived.wait()
            if stream:
                await reader.readuntil(b"t0 ")
    finally:
        writer.close()
    async with asyncio.timeout(60):
        await engine.left.wait()
    status = await house.gateway.until("/admin/status", lambda s: s["in_flight"]["worker-0"] == 0)
    assert status["ready"]["ready"]
    sample = f'{REQUESTS}{{endpoint="{CHAT}",expert="expert-0000",status="499",worker="worker-0"}}'
    await house.gateway.counts(sample)


async def test_a_hang_up_while_the_body_comes(house: House) -> None:
    host, port = house.gateway.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    sample = f'{REQUESTS}{{endpoint="{CHAT}",expert="none",status="499",worker="none"}}'
    await house.gateway.counts(sample)
    assert not house.sport.seen


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["whole", "hung up", "late", "lost"])
async def test_nothing_of_a_request_stays(
    house: House, end: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifelines = []

    class Noted(Lifeline):
        __slots__ = ("__weakref__",)

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            lifelines.append(weakref.ref(self))

    monkeypatch.setattr("server.gateway.forward.Lifeline", Noted)
    engine, body = house.sport, chat("expert-0000", stream=stream)
    headers = {"x-introvert-deadline-ms": "50"} if end == "late" else {}
    if end == "lost":
        engine.behaviour = "die_in_stream" if stream else "die_in_body"
    elif stream and end == "hung up":
        engine.tokens, engine.token_delay_s = 1000, 0.05
    elif end != "whole":
        engine.behaviour = "wait"
    gc.disable()  # it comes so rarely that what waits for it was 28 MiB in ten minutes
    try:
        for _ in range(3):
            if end == "hung up":
                engine.arrived.clear()
                reader, writer = await _send_raw(house.gateway, body)
                async with asyncio.timeout(60):
                    await (reader.readuntil(b"t0 ") if stream else engine.arrived.wait())
                writer.close()
            else:
                status = await _ask_to_the_end(house.gateway, body, headers)
                assert (status == 200) == (end == "whole" or (end == "lost" and stream))
        async with asyncio.timeout(60):
            while any(kept() for kept in lifelines):  # noqa: ASYNC110 - nobody tells of an end
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
    assert len(lifelines) == 3


async def test_running_requests_keep_their_home_when_the_table_changes(
    house: House, start_engine: StartEngine
) -> None:
    house.sport.tokens, house.sport.token_delay_s = 8, 0.05
    stream = await house.gateway.openai().chat.completions.create(
        **chat("expert-0000", stream=True)
    )
    first = await anext(aiter(stream))
    newer: FakeEngine = await start_engine(name="newer")
    version = "expert-0000@eeeeeeeeeeee"
    table = make_table(2, make_worker(2, newer.url, [version]))
    home = table.experts[0].model_copy(
        update={"served_name": version, "version": "eeeeeeeeeeee", "workers": ["worker-2"]}
    )
    await house.gateway.uses(table.model_copy(update={"experts": [home]}))
    _, answer, headers = await house.gateway.post(CHAT, chat("expert-0000"))
    assert answer["model"] == version
    assert headers["x-introvert-worker"] == "worker-2"
    rest = [chunk async for chunk in stream]
    assert [first.model, *(chunk.model for chunk in rest)] == [SPORT] * 8
    status, answer, _ = await house.gateway.post(CHAT, chat(SPORT))
    assert status == 404
    assert version in answer["error"]["message"]


async def test_the_less_loaded_home_is_taken(house: House) -> None:
    await house.gateway.uses(
        make_table(
            2,
            make_worker(0, house.sport.url, [SPORT]),
            make_worker(1, house.law.url, [SPORT]),
        )
    )
    house.sport.token_delay_s = house.law.token_delay_s = 30
    streams = [
        await house.gateway.openai().chat.completions.create(**chat("expert-0000", stream=True))
        for _ in range(6)
    ]
    assert len(house.sport.seen) == len(house.law.seen) == 3
    for stream in streams:
        await stream.close()


async def test_many_at_once_each_get_their_own(house: House) -> None:
    house.sport.token_delay_s = house.law.token_delay_s = 0.001

    async def ask(number: int) -> None:
        word, name = (("sport", SPORT), ("law", LAW))[number % 2]
        if number % 3:
            _, answer, headers = await house.gateway.post(CHAT, chat("introvert", word))
            assert answer["model"] == name
            assert headers["x-introvert-expert"] == name.partition("@")[0]
        else:
            async with house.gateway.http.post(
                house.gateway.url + CHAT, json=chat("introvert", word, stream=True)
            ) as response:
                assert name.encode() in await response.read()

    await asyncio.gather(*(ask(number) for number in range(200)))
    await house.gateway.until("/admin/status", lambda s: set(s["in_flight"].values()) == {0})


async def _ask_to_the_end(gateway: Gateway, body: dict[str, Any], headers: dict[str, str]) -> int:
    url = gateway.url + CHAT
    async with gateway.http.post(url, json=body, headers=headers) as response:
        await response.read()
        return response.status


async def _send_raw(
    gateway: Gateway, body: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer
