"""Waiting, spilling, deadlines, limits and bundles: through the real gateway to fake engines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.types import Candidate, Route
from server.gateway.queueing import runners_up
from server.table import Canary, ExpertHome
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
NEW_SPORT = "expert-0000@eeeeeeeeeeee"


async def behind(
    start_engine: StartEngine, start_gateway: StartGateway, **options: Any
) -> tuple[Gateway, FakeEngine]:
    """A gateway before one engine that never answers."""
    engine = await start_engine(behaviour="wait")
    table = make_table(1, make_worker(0, engine.url, [SPORT, LAW]))
    return await start_gateway(table, **options), engine


async def is_asked(engine: FakeEngine, times: int = 1) -> None:
    async with asyncio.timeout(60):
        while len(engine.seen) < times:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0.01)


async def waits_in_line(gateway: Gateway) -> None:
    await gateway.until("/admin/status", lambda status: status["queued"].get("worker-0") == 1)


async def test_more_than_a_worker_takes_wait_and_more_than_may_wait_are_refused(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    gateway, engine = await behind(
        start_engine, start_gateway, worker_concurrency=1, max_queue=1, queue_timeout_s=1
    )
    first = asyncio.create_task(gateway.post(CHAT, chat("expert-0000")))
    try:
        await is_asked(engine)
        waits = asyncio.create_task(gateway.post(CHAT, chat("expert-0000")))
        await waits_in_line(gateway)
        status, answer, headers = await gateway.post(CHAT, chat("expert-0000"))
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        status, answer, headers = await waits
        assert (status, answer["error"]["code"]) == (503, "queue_timeout")
        assert headers["retry-after"] == "1"
        assert len(engine.seen) == 1
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_whoever_waits_and_hangs_up_leaves_the_queue(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    gateway, engine = await behind(
        start_engine, start_gateway, worker_concurrency=1, max_queue=1, queue_timeout_s=30
    )
    first = asyncio.create_task(gateway.post(CHAT, chat("expert-0000")))
    try:
        await is_asked(engine)
        waits = asyncio.create_task(gateway.post(CHAT, chat("expert-0000")))
        await waits_in_line(gateway)
        waits.cancel()
        gone = f'endpoint="{CHAT}",expert="expert-0000",status="499",worker="none"'
        await gateway.counts(f"introvert_gateway_requests_total{{{gone}}}")
        engine.behaviour = "answer"
        last = asyncio.create_task(gateway.post(CHAT, chat("expert-0000")))
        await waits_in_line(gateway)
        first.cancel()
        status, _, _ = await last
        assert status == 200
        assert len(engine.seen) == 2
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_request_waits_for_its_expert_to_come_back(house: House) -> None:
    down = make_worker(0, None, [SPORT], state="starting")
    await house.gateway.uses(make_table(2, down, make_worker(1, house.law.url, [LAW])))
    house.gateway.tables.publish(
        make_table(
            3,
            make_worker(0, house.sport.url, [SPORT], pid=2),
            make_worker(1, house.law.url, [LAW]),
        )
    )
    status, answer, _ = await house.gateway.post(CHAT, chat("expert-0000"))
    assert (status, answer["model"]) == (200, SPORT)


async def test_a_queue_moves_to_another_home_when_its_worker_is_lost(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    gateway, engine = await behind(start_engine, start_gateway, worker_concurrency=1)
    other = await start_engine(name="other")
    first = asyncio.create_task(gateway.post(CHAT, chat("expert-0000")))
    try:
        await is_asked(engine)
        waits = asyncio.create_task(gateway.post(CHAT, chat("expert-0000")))
        await waits_in_line(gateway)
        lost = make_worker(0, None, [], state="down")
        await gateway.uses(make_table(2, lost, make_worker(1, other.url, [SPORT])))
        status, _, headers = await waits
        assert (status, headers["x-introvert-worker"]) == (200, "worker-1")
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_routed_request_spills_to_the_runner_up_and_says_so(house: House) -> None:
    down = make_worker(0, None, [SPORT], state="down")
    await house.gateway.uses(make_table(2, down, make_worker(1, house.law.url, [LAW])))
    status, answer, headers = await house.gateway.post(CHAT, chat("introvert", "sport"))
    assert (status, answer["model"]) == (200, LAW)
    assert headers["x-introvert-spill"] == "runner-up"
    assert headers["x-introvert-routed-expert"] == "expert-0000"
    assert headers["x-introvert-expert"] == "expert-0001"
    spills = 'introvert_gateway_spills_total{expert="expert-0000",to="runner-up"}'
    assert await house.gateway.metric(spills) == 1
    _, _, headers = await house.gateway.post(CHAT, chat("introvert", "law"))
    assert "x-introvert-spill" not in headers


def test_a_runner_up_is_one_that_its_own_bundle_would_not_abstain_from() -> None:
    top = (Candidate("a", 0.75), Candidate("b", 0.5), Candidate("c", 0.25))
    route = Route("a", 0, 0.75, 0.25, False, top)
    assert runners_up(route, 0.4) == ["b"]
    assert runners_up(route, None) == []  # the router has gone: nobody can tell


async def test_nothing_spills_where_that_is_off(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    engine = await start_engine()
    down = make_worker(0, None, [SPORT], state="down")
    table = make_table(1, down, make_worker(1, engine.url, [LAW]))
    gateway = await start_gateway(table, spill_wait_s=None, queue_timeout_s=0.2)
    status, answer, _ = await gateway.post(CHAT, chat("introvert", "sport"))
    assert (status, answer["error"]["code"]) == (503, "no_engine")


@pytest.mark.parametrize("from_client", [True, False])
async def test_a_deadline_ends_a_request_and_frees_the_engine(
    start_engine: StartEngine, start_gateway: StartGateway, from_client: bool
) -> None:
    options = {} if from_client else {"deadline_s": 0.6}
    headers = {"x-introvert-deadline-ms": "600" if from_client else "60000"}
    gateway, engine = await behind(start_engine, start_gateway, **options)
    status, answer, _ = await gateway.post(CHAT, chat("expert-0000"), headers=headers)
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    async with asyncio.timeout(60):
        await engine.left.wait()
    assert "x-introvert-deadline-ms" not in engine.seen[0].headers


async def test_a_deadline_bounds_only_the_beginning_of_a_stream(house: House) -> None:
    house.sport.tokens, house.sport.token_delay_s = 4, 0.3
    async with house.gateway.http.post(
        house.gateway.url + CHAT,
        json=chat("expert-0000", stream=True),
        headers={"x-introvert-deadline-ms": "900"},
    ) as response:
        text = await response.read()
    assert text.endswith(b"data: [DONE]\n\n")


async def test_a_deadline_must_be_a_number(house: House) -> None:
    for value in ("soon", "-1", "nan", "inf"):
        status, answer, _ = await house.gateway.post(
            CHAT, chat("expert-0000"), headers={"x-introvert-deadline-ms": value}
        )
        assert (status, answer["error"]["code"]) == (400, "invalid_type")


async def test_limits_of_headers_and_prompts(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    engine = await start_engine()
    table = make_table(1, make_worker(0, engine.url, [SPORT]))
    gateway = await start_gateway(table, max_header_bytes=1000, max_prompt_bytes=1000)
    status, answer, headers = await gateway.post(
        CHAT, chat("expert-0000"), headers={"x-large": "x" * 1000}
    )
    assert (status, answer["error"]["code"]) == (431, "headers_too_large")
    assert len(headers["x-request-id"]) == 32
    status, answer, _ = await gateway.post(CHAT, chat("expert-0000", "x" * 1000))
    assert (status, answer["error"]["code"]) == (413, "prompt_too_large")
    assert answer["error"]["param"] == "messages"
    assert not engine.seen


async def test_a_client_that_sends_too_slowly_is_told_so(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    gateway, engine = await behind(start_engine, start_gateway, client_timeout_s=0.4)
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{".encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)
        assert b"408" in head
        assert not engine.seen
    finally:
        writer.close()


async def test_a_client_that_takes_nothing_loses_its_stream(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    engine = await start_engine(tokens=10**9)
    table = make_table(1, make_worker(0, engine.url, [SPORT]))
    gateway = await start_gateway(table, client_timeout_s=0.5)
    host, port = gateway.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    try:
        body = b'{"model":"expert-0000","messages":[],"stream":true}'
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)  # and reads nothing
        async with asyncio.timeout(60):
            await engine.left.wait()
        await gateway.until("/admin/status", lambda s: s["in_flight"]["worker-0"] == 0)
    finally:
        writer.close()


async def test_tokens_are_counted_from_the_answer(house: House) -> None:
    await house.gateway.post(CHAT, chat("expert-0000"))
    counted = 'introvert_gateway_output_tokens_total{expert="expert-0000"}'
    assert await house.gateway.metric(counted) == 2


async def test_bundles_are_not_mixed_during_a_canary(house: House) -> None:
    home = ExpertHome(
        id="expert-0000",
        version="eeeeeeeeeeee",
        served_name=NEW_SPORT,
        cluster=0,
        workers=["worker-0"],
    )
    canary = Canary(bundle="dddddddddddd", place="next", share=1.0, experts=[home])
    workers = [make_worker(0, house.sport.url, [SPORT, NEW_SPORT, LAW])]
    await house.gateway.uses(make_table(2, *workers, canary=canary))
    _, answer, _ = await house.gateway.post(CHAT, chat("expert-0000"))
    assert answer["model"] == NEW_SPORT
    _, answer, _ = await house.gateway.post(CHAT, chat(SPORT))
    assert answer["model"] == SPORT
    # The fake source hands out the router of the served bundle alone, so that the canary's is
    # never ready and routed requests stay with the served bundle.
    _, answer, _ = await house.gateway.post(CHAT, chat("introvert", "sport"))
    assert answer["model"] == SPORT
    _, answer, _ = await house.gateway.post(CHAT, chat(BASE))
    assert answer["model"] == BASE


async def test_no_connection_to_an_engine_is_left_behind(house: House) -> None:
    house.sport.token_delay_s = 0.01

    async def leave(number: int) -> None:
        async with house.gateway.http.post(
            house.gateway.url + CHAT, json=chat("expert-0000", str(number), stream=True)
        ) as response:
            if number % 2:
                await response.read()
            else:
                await response.content.readany()

    for _ in range(3):
        await asyncio.gather(*(leave(number) for number in range(20)))
    await house.gateway.until("/admin/status", lambda s: set(s["in_flight"].values()) == {0})
