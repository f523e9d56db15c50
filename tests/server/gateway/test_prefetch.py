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
    FakeEngine,
    Gateway,
    StartEngine,
    StartGateway,
    chat,
    make_table,
    make_worker,
)

CHAT = "/v1/chat/completions"
COUNTED = 'introvert_gateway_prefetches_total{worker="worker-0"}'


async def crowded(
    start_engine: StartEngine, start_gateway: StartGateway
) -> tuple[Gateway, FakeEngine, asyncio.Event]:
    """A gateway before an engine whose two experts take turns on one slot; its streams go on beyond
    their first token once the event is set."""
    held = asyncio.Event()
    engine = await start_engine(first_token_only=held)
    table = make_table(1, make_worker(0, engine.url, [SPORT, LAW], slots=1))
    return await start_gateway(table), engine, held


async def test_the_next_expert_is_copied_in_while_its_request_waits(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    gateway, engine, held = await crowded(start_engine, start_gateway)
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
    gateway, engine, held = await crowded(start_engine, start_gateway)
    async with gateway.http.post(
        gateway.url + CHAT, json=chat("expert-0000", stream=True)
    ) as streaming:
        await streaming.content.readany()
        waits = [asyncio.create_task(gateway.post(CHAT, chat("expert-0001"))) for _ in range(3)]
        await gateway.counts(COUNTED)
        assert engine.filled == [[SPORT, LAW]]
        assert len(engine.seen) == 1, "the requests themselves still wait"
        held.set()
        await streaming.read()
    assert [status for status, *_ in await asyncio.gather(*waits)] == [200] * 3
    assert engine.filled == [[SPORT, LAW]]
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


class Engine(Asked):
    """One with so many slots, which forgets what was used least lately, as vLLM does."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = Residency(slots)

    async def post(self, root: str, path: str, body: bytes, headers: Any) -> Answer:
        for name in json.loads(body)["lora_names"]:
            self.slots.touch(name)
        return await super().post(root, path, body, headers)

    def step(self, *running: str) -> list[str]:
        """Compute; which of those that run had to be copied in for it."""
        return [name for name in running if self.slots.touch(name)]


@dataclass
class House:
    """A lane, and what is sent to its engine."""

    slots: int = 1
    pause_s: float = 0.0
    failed_pause_s: float = 0.0

    def __post_init__(self) -> None:
        self.engine = Engine(self.slots + 1)
        self.lane = Lane(limit=9, max_queue=99, group_wait_s=math.inf, clock=lambda: 0.0)
        self.lane.regroup(self.slots)
        self.metrics = Metrics()
        self.residency = Residency(self.slots + 1)
        self.home = Home("worker-0", "http://host", self.lane, self.residency)
        upstream: Any = self.engine
        self.prefetch = Prefetch(upstream, self.metrics, self.pause_s, self.failed_pause_s)
        self.tickets: dict[str, Group] = {}
        self.cold: list[str] = []
        """Experts that the engine had to copy in with the first step of a request."""

    def come(self, expert: str, tenant: str = "") -> Any:
        """A request comes; whoever waits for it is returned."""
        ticket = self.lane.enter(expert)
        if ticket is not None:
            self._begin(expert, ticket)
            return None

        def woken(ticket: Group | None) -> None:
            assert ticket is not None
            self._begin(expert, ticket)
            self.prefetch.entered(self.home)

        waiter = self.lane.queue(expert, tenant, 1.0, woken)
        self.prefetch.consider(self.home)
        return waiter

    def _begin(self, expert: str, ticket: Group) -> None:
        self.tickets[expert] = ticket
        thought = self.residency.touch(expert)
        found = self.engine.step(expert)
        assert thought == bool(found), "the gateway knows what the engine has"
        self.cold += found

    async def end(self, expert: str) -> None:
        """The request of an expert ends; until then all that run have been computed."""
        self.engine.step(*(name for name in self.tickets if name != expert), expert)
        self.residency.touch(expert)
        self.lane.leave(self.tickets.pop(expert))
        await self.sent()

    async def leave(self, waiter: Any) -> None:
        """Somebody waits no longer."""
        self.lane.abandon(waiter)
        self.prefetch.consider(self.home)
        await self.sent()

    async def sent(self) -> list[list[str]]:
        """What the engine was told since the last time."""
        for _ in range(9):
            await asyncio.sleep(0)
        self.told, self.engine.names = self.engine.names, []
        return self.told


@pytest.fixture
def house() -> House:
    return House()


async def test_one_at_a_time_and_the_next_when_that_one_has_begun(house: House) -> None:
    for expert in "abc":
        house.come(expert)
    assert await house.sent() == [["a", "b"]], "what runs is used at every step"
    await house.end("a")
    assert house.told == [["b", "c"]]
    await house.end("b")
    assert house.told == []
    assert house.cold == ["a"]
    assert f"{COUNTED} 2" in house.metrics.exposition().decode()


async def test_who_is_given_up_leaves_the_place_to_the_next(house: House) -> None:
    house.come("a")
    waiter = house.come("b")
    house.come("c")
    assert await house.sent() == [["a", "b"]]
    await house.leave(waiter)
    assert house.told == [["a", "c"]], "without anybody's coming"


async def test_what_lies_in_a_slot_is_not_copied_again(house: House) -> None:
    house.come("b")
    await house.end("b")
    house.come("a")
    house.come("b")
    assert await house.sent() == []


async def test_who_overtakes_the_one_copied_ahead_costs_a_copy(house: House) -> None:
    house.come("a", "first")
    house.come("c", "first")
    house.come("z", "first")
    assert await house.sent() == [["a", "c"]]
    house.come("y", "second")  # who has not been served yet, and so goes before z
    await house.end("a")
    assert house.told == [["c", "y"]]
    await house.end("c")
    assert house.told == [["y", "z"]]
    await house.end("y")
    assert house.cold == ["a"]


async def test_a_long_answer_does_not_end_it() -> None:
    house = House(slots=2)
    house.come("long")
    house.come("b")
    for after, expert in zip("cdbcdb", "bcdbcd", strict=True):
        house.come(after)
        await house.sent()
        await house.end(expert)
    assert house.cold == ["long", "b"], "all others were copied ahead of their requests"


@pytest.mark.parametrize(
    "outcome", [404, 503, UnreachableError("gone"), EngineLostError("lost", retry_after_s=1)]
)
async def test_what_cannot_be_copied_costs_one_call_and_is_a_cold_load(
    outcome: int | Exception,
) -> None:
    house = House(failed_pause_s=3600)
    house.engine.outcome = outcome
    house.come("a")
    house.come("b")
    assert await house.sent() == [["a", "b"]]
    house.come("b")
    assert await house.sent() == []
    assert "b" not in house.residency
    assert COUNTED not in house.metrics.exposition().decode()


async def test_an_engine_is_left_in_peace_between_two_copies() -> None:
    house = House(pause_s=0.2)
    house.come("a")
    for expert in "bc" * 50:  # who hangs up at once and comes again for another
        await house.leave(house.come(expert))
        house.engine.names = house.told + house.engine.names
    assert [names[-1] for names in house.engine.names] in (["b"], ["b", "c"])
    house.engine.names = []
    loop = asyncio.get_running_loop()
    began = loop.time()
    house.come("d")
    async with asyncio.timeout(60):
        while not await house.sent():  # noqa: ASYNC110 - nobody comes any more
            await asyncio.sleep(0.01)
    assert house.told == [["a", "d"]]
    assert loop.time() - began < 30


async def test_where_all_have_slots_nothing_is_copied(house: House) -> None:
    home = Home("worker-0", "http://host", house.lane)
    house.come("a")
    house.lane.queue("b", "", 1.0, lambda _: None)
    house.prefetch.consider(home)
    house.prefetch.entered(home)
    assert await house.sent() == []
