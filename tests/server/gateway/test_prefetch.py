"""Slots filled ahead: through the real gateway to a fake engine, and event by event."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.engine_slots import FILL_PATH
from server.gateway.admission import Group, Lane
from server.gateway.errors import EngineLostError
from server.gateway.metrics import Metrics
from server.gateway.prefetch import Prefetch
from server.gateway.residency import Residency
from server.gateway.upstream import UnreachableError
from server.gateway.views import Home
from tests.server.gateway.conftest import (
    LAW,
    SPORT,
    StartEngine,
    StartGateway,
    chat,
    make_table,
    make_worker,
)

CHAT = "/v1/chat/completions"
COUNTED = 'introvert_gateway_prefetches_total{worker="worker-0"}'


async def test_the_next_expert_is_copied_in_while_its_request_waits(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    held = asyncio.Event()
    engine = await start_engine(first_token_only=held)
    table = make_table(1, make_worker(0, engine.url, [SPORT, LAW], slots=1))
    gateway = await start_gateway(table)
    first = asyncio.create_task(gateway.post(CHAT, chat("expert-0001")))
    assert (await first)[0] == 200
    assert engine.filled == [], "nobody had to wait"
    async with gateway.http.post(
        gateway.url + CHAT, json=chat("expert-0000", stream=True)
    ) as streaming:
        await streaming.content.readany()
        waits = [asyncio.create_task(gateway.post(CHAT, chat("expert-0001"))) for _ in range(3)]
        await gateway.until("/admin/status", lambda status: status["queued"]["worker-0"] == 3)
        assert engine.filled == [], "it is in the slot to spare, where it was used before"
        held.set()
        await streaming.read()
    assert [status for status, *_ in await asyncio.gather(*waits)] == [200] * 3


async def test_a_copied_expert_is_no_cold_load(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    held = asyncio.Event()
    engine = await start_engine(first_token_only=held)
    table = make_table(1, make_worker(0, engine.url, [SPORT, LAW], slots=1))
    gateway = await start_gateway(table)
    async with gateway.http.post(
        gateway.url + CHAT, json=chat("expert-0000", stream=True)
    ) as streaming:
        await streaming.content.readany()
        waits = [asyncio.create_task(gateway.post(CHAT, chat("expert-0001"))) for _ in range(3)]
        await gateway.counts(COUNTED)
        assert engine.filled == [[LAW]]
        assert len(engine.seen) == 1, "the requests themselves still wait"
        held.set()
        await streaming.read()
    assert [status for status, *_ in await asyncio.gather(*waits)] == [200] * 3
    assert engine.filled == [[LAW]]
    cold = 'introvert_gateway_cold_loads_total{expert="%s"}'
    assert await gateway.metric(cold % "expert-0000") == 1
    assert await gateway.metric(cold % "expert-0001") == 0


@dataclass
class Answer:
    status: int = 200

    def close(self) -> None:
        pass


@dataclass
class Asked:
    """An `Upstream` that remembers what it was to send."""

    names: list[list[str]] = field(default_factory=list)
    outcome: int | Exception = 200

    async def post(self, root: str, path: str, body: bytes, headers: Any) -> Answer:
        assert (root, path) == ("http://host", FILL_PATH)
        self.names.append(json.loads(body)["lora_names"])
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return Answer(self.outcome)

    async def whole(self, answer: Answer) -> bytes:
        return b"{}"


@dataclass
class House:
    """A lane with one slot, and what is sent to its engine."""

    upstream: Asked = field(default_factory=Asked)
    lane: Lane = field(
        default_factory=lambda: Lane(
            limit=9, max_queue=99, group_wait_s=math.inf, clock=lambda: 0.0
        )
    )
    metrics: Metrics = field(default_factory=Metrics)
    pause_s: float = 0.0

    def __post_init__(self) -> None:
        self.lane.regroup(1)
        self.residency = Residency(2)
        self.home = Home("worker-0", "http://host", self.lane, self.residency)
        self.prefetch = Prefetch(self.upstream, self.metrics, self.pause_s)  # type: ignore[arg-type]
        self.tickets: dict[str, Group] = {}

    def come(self, expert: str) -> Any:
        """A request comes; whoever waits for it is returned."""
        ticket = self.lane.enter(expert)
        if ticket is not None:
            self.residency.touch(expert)
            self.tickets[expert] = ticket
            return None

        def woken(ticket: Group | None) -> None:
            assert ticket is not None
            self.tickets[expert] = ticket

        waiter = self.lane.queue(expert, "", 1.0, woken)
        self.prefetch.consider(self.home)
        return waiter

    async def end(self, expert: str) -> None:
        """The request of an expert ends; the next one is let in, as `queueing` does it."""
        waiting = set(self.tickets)
        self.lane.leave(self.tickets.pop(expert))
        for entered in set(self.tickets) - waiting:
            self.prefetch.consider(self.home, entering=entered)
            self.residency.touch(entered)
        await self.sent()

    async def sent(self) -> list[list[str]]:
        """What the engine was told since the last time."""
        for _ in range(5):
            await asyncio.sleep(0)
        self.told, self.upstream.names = self.upstream.names, []
        return self.told


@pytest.fixture
def house() -> House:
    return House()


async def test_one_at_a_time_and_the_one_that_enters_is_kept(house: House) -> None:
    for expert in "abcb":
        house.come(expert)
    assert await house.sent() == [["b"]]
    await house.end("a")
    assert house.told == [["b", "c"]], "the engine may not have used b since it was copied"
    await house.end("b")
    assert house.told == []
    assert await house.sent() == []
    text = house.metrics.exposition().decode()
    assert f"{COUNTED} 2" in text


async def test_who_is_given_up_leaves_the_place_to_the_next(house: House) -> None:
    house.come("a")
    waiter = house.come("b")
    assert await house.sent() == [["b"]]
    house.lane.abandon(waiter)
    house.come("c")
    assert await house.sent() == [["c"]]


async def test_what_lies_in_a_slot_is_not_copied_again(house: House) -> None:
    house.come("b")
    await house.end("b")
    house.come("a")
    house.come("b")
    assert await house.sent() == []


@pytest.mark.parametrize(
    "outcome", [404, 503, UnreachableError("gone"), EngineLostError("lost", retry_after_s=1)]
)
async def test_what_cannot_be_copied_costs_one_call_and_is_a_cold_load(
    house: House, outcome: int | Exception
) -> None:
    house.upstream.outcome = outcome
    house.come("a")
    house.come("b")
    assert await house.sent() == [["b"]]
    house.come("b")
    assert await house.sent() == []
    assert "b" not in house.residency
    assert COUNTED not in house.metrics.exposition().decode()


async def test_an_engine_is_left_in_peace_between_two_copies() -> None:
    house = House(pause_s=0.2)
    loop = asyncio.get_running_loop()
    house.come("a")
    for expert in "bc" * 50:  # who hangs up at once and comes again for another
        house.lane.abandon(house.come(expert))
    assert await house.sent() == [["b"]]
    ended = loop.time()
    waiter = house.come("c")
    while not await house.sent():
        house.lane.abandon(waiter)
        await asyncio.sleep(0.01)
        waiter = house.come("c")
    assert house.told == [["c"]]
    assert loop.time() - ended > 0.19


async def test_where_all_have_slots_nothing_is_copied(house: House) -> None:
    home = Home("worker-0", "http://host", house.lane)
    house.come("a")
    house.lane.queue("b", "", 1.0, lambda _: None)
    house.prefetch.consider(home)
    assert await house.sent() == []
