"""Requests of batches beside live ones: through the real gateway to fake engines."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from server.gateway.seat import Seat
from server.keys import KeyEntry, add_key, digest_of
from tests.server.gateway.conftest import (
    LAW,
    SPORT,
    FakeEngine,
    StartEngine,
    StartGateway,
    chat,
    make_table,
    make_worker,
)

CHAT = "/v1/chat/completions"
BATCH = {"headers": {"x-introvert-priority": "batch"}}


async def is_asked(engine: FakeEngine, times: int) -> None:
    async with asyncio.timeout(60):
        while len(engine.seen) < times:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0.01)


async def test_they_are_put_off_where_enough_is_in_flight_and_live_ones_are_not(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    engine = await start_engine(behaviour="wait")
    table = make_table(1, make_worker(0, engine.url, [SPORT, LAW]))
    gateway = await start_gateway(table, worker_concurrency=4, batch_concurrency=2)
    asked = [asyncio.create_task(gateway.post(CHAT, chat("expert-0000"), **BATCH))]
    try:
        await is_asked(engine, 1)
        asked.append(asyncio.create_task(gateway.post(CHAT, chat("expert-0000"))))
        await is_asked(engine, 2)
        status, answer, headers = await gateway.post(CHAT, chat("introvert", "sport"), **BATCH)
        assert (status, answer["error"]["code"]) == (429, "yielding")
        assert headers["retry-after"] == "1"
        asked += [asyncio.create_task(gateway.post(CHAT, chat("expert-0001"))) for _ in range(2)]
        await is_asked(engine, 4)  # the live ones have the whole lane
        engine.behaviour = "answer"
        waits = asyncio.create_task(gateway.post(CHAT, chat("expert-0000")))
        await gateway.until("/admin/status", lambda s: s["queued"].get("worker-0") == 1)
        asked[0].cancel()
        status, _, _ = await waits
        assert status == 200
        await gateway.counts('introvert_gateway_rejected_total{reason="yielding"}')
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_without_a_worker_they_do_not_wait(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    engine = await start_engine()
    down = make_worker(0, engine.url, [SPORT], state="down")
    gateway = await start_gateway(make_table(1, down), queue_timeout_s=60)
    status, answer, _ = await gateway.post(CHAT, chat("expert-0000"), **BATCH)
    assert (status, answer["error"]["code"]) == (429, "yielding")


async def test_of_priority_and_tenant_engines_learn_nothing(
    start_engine: StartEngine, start_gateway: StartGateway, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    for name, limits in (("alice", {"requests_per_minute": 1}), ("bob", {"experts": ["base"]})):
        entry = {"name": name, "sha256": digest_of(name).hex(), **limits}
        add_key(keys, KeyEntry.model_validate(entry))
    engine = await start_engine()
    gateway = await start_gateway(
        make_table(1, make_worker(0, engine.url, [SPORT])),
        keys_file=str(keys),
        seat=Seat(engine_key="of-the-run"),
    )

    async def ask(key: str, tenant: str) -> int:
        headers = {"authorization": f"Bearer {key}", "x-introvert-tenant": tenant}
        headers |= BATCH["headers"]
        status, _, _ = await gateway.post(CHAT, chat("expert-0000"), headers=headers)
        return status

    assert [await ask("of-the-run", "alice") for _ in range(4)] == [200] * 4
    assert await ask("of-the-run", "bob") == 403
    assert await ask("of-the-run", "nobody") == 401
    assert await ask("wrong", "alice") == 401
    assert len(engine.seen) == 4
    for seen in engine.seen:
        assert not {"x-introvert-priority", "x-introvert-tenant"} & set(seen.headers)
        assert seen.headers["authorization"] == "Bearer of-the-run", "the gateway's own"


@pytest.mark.parametrize("value", ["high", "BATCH"])
async def test_another_priority_is_none(
    start_engine: StartEngine, start_gateway: StartGateway, value: str
) -> None:
    engine = await start_engine()
    table = make_table(1, make_worker(0, engine.url, [SPORT]))
    gateway = await start_gateway(table, batch_concurrency=1)
    headers = {"x-introvert-priority": value}
    status, _, _ = await gateway.post(CHAT, chat("expert-0000"), headers=headers)
    assert status == 200
