"""API keys in front of engines: refusals in the client's dialect, limits, allow-lists."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anthropic
import openai
import pytest

from server.keys import KeyEntry, add_key, digest_of
from tests.server.gateway.conftest import (
    BASE,
    LAW,
    SPORT,
    Gateway,
    House,
    StartGateway,
    chat,
    make_table,
    make_worker,
)

CHAT = "/v1/chat/completions"


@pytest.fixture
async def guarded(house: House, start_gateway: StartGateway, tmp_path: Path) -> Gateway:
    """Alice may ask one expert; Bob three times a minute; Carol one thing at a time."""
    keys = tmp_path / "keys.yaml"
    for name, limits in (
        ("alice", {"experts": ["expert-0001"]}),
        ("bob", {"requests_per_minute": 3}),
        ("carol", {"concurrent": 1}),
    ):
        entry = {"name": name, "sha256": digest_of(name).hex(), **limits}
        add_key(keys, KeyEntry.model_validate(entry))
    workers = make_worker(0, house.sport.url, [SPORT]), make_worker(1, house.law.url, [LAW])
    return await start_gateway(make_table(1, *workers), keys_file=str(keys))


def key(name: str) -> dict[str, dict[str, str]]:
    return {"headers": {"authorization": f"Bearer {name}"}}


async def test_without_a_key_official_clients_say_so(guarded: Gateway, house: House) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await guarded.openai().chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": "x"}]
        )
    assert caught.value.code == "invalid_api_key"
    client = anthropic.AsyncAnthropic(base_url=guarded.url, api_key="nobody", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as other:
        await client.messages.create(
            model=BASE, max_tokens=1, messages=[{"role": "user", "content": "x"}]
        )
    assert isinstance(other.value.body, dict)
    assert other.value.body["error"]["type"] == "authentication_error"
    assert not house.sport.seen + house.law.seen
    await guarded.counts('introvert_gateway_rejected_total{reason="invalid_api_key"}')


async def test_a_key_does_not_reach_the_engine(guarded: Gateway, house: House) -> None:
    status, _, _ = await guarded.post(CHAT, chat("expert-0001"), **key("alice"))
    assert status == 200
    status, _, _ = await guarded.post(
        CHAT, chat("expert-0001"), headers={"x-api-key": "alice", "authorization": ""}
    )
    assert status == 200
    for seen in house.law.seen:
        assert "alice" not in str(seen.headers)
    await guarded.counts('introvert_gateway_tenant_requests_total{status="200",tenant="alice"}')


async def test_an_allow_list(guarded: Gateway) -> None:
    for model in ("expert-0000", SPORT, BASE):
        status, answer, _ = await guarded.post(CHAT, chat(model), **key("alice"))
        assert (status, answer["error"]["code"]) == (403, "model_not_allowed")
    # routed to the one, allowed the other: the best that is allowed answers
    status, _, headers = await guarded.post(CHAT, chat("introvert", "sport"), **key("alice"))
    assert (status, headers["x-introvert-expert"]) == (200, "expert-0001")


async def test_a_route_is_explained_as_the_key_would_get_it(guarded: Gateway) -> None:
    texts = {"input": ["sport", "?"]}
    _, answer, _ = await guarded.post("/v1/route", texts, **key("alice"))
    sport, nothing = answer["data"]
    assert (sport["expert"], sport["model"], sport["allowed"]) == ("expert-0001", LAW, True)
    assert [c["allowed"] for c in sport["candidates"]] == [False, True]
    assert (nothing["expert"], nothing["model"], nothing["allowed"]) == (None, BASE, False)
    _, answer, _ = await guarded.post("/v1/route", texts, **key("carol"))
    assert [(r["expert"], r["allowed"]) for r in answer["data"]] == [
        ("expert-0000", True),
        (None, True),
    ]


async def test_a_rate(guarded: Gateway) -> None:
    statuses = []
    for _ in range(4):
        status, answer, headers = await guarded.post(CHAT, chat(BASE), **key("bob"))
        statuses.append(status)
    assert statuses == [200, 200, 200, 429]
    assert answer["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(headers["retry-after"]) <= 20


async def test_concurrency(guarded: Gateway, house: House) -> None:
    house.law.behaviour = "wait"
    first = asyncio.create_task(guarded.post(CHAT, chat("expert-0001"), **key("carol")))
    try:
        await asyncio.wait_for(house.law.arrived.wait(), 60)
        status, answer, headers = await guarded.post(CHAT, chat("expert-0000"), **key("carol"))
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert headers["retry-after"] == "1"
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    async with asyncio.timeout(60):
        while True:  # it is over once the gateway has noticed
            status, _, _ = await guarded.post(CHAT, chat("expert-0000"), **key("carol"))
            if status == 200:
                break
            await asyncio.sleep(0.05)
