from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from server import caretaker as module
from server.controller import Controller
from server.errors import NotBegunError
from server.orders import Orders, Post
from server.placement import Policy
from server.table import RoutingTable
from tests.server.fake_workers import (
    DEPLOYMENT,
    RULES,
    FakeWorker,
    following,
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.1)


class Fixture:
    def __init__(self) -> None:
        self.workers = {name: FakeWorker(name) for name in ("worker-0", "worker-1")}
        self.controllers: list[Controller] = []
        self.rules = RULES
        self.seen = 0

    async def controller(self, last: RoutingTable | None = None) -> Controller:
        self.controllers.append(Controller())
        posts = self.posts(adopted=last is not None)
        await self.controllers[-1].direct(Orders(DEPLOYMENT), posts, self.rules, last)
        return self.controllers[-1]

    def posts(self, adopted: bool = False) -> dict[str, Post]:
        return {name: Post(name, w, "127.0.0.1", adopted) for name, w in self.workers.items()}

    async def until(
        self, controller: Controller, condition: Callable[[RoutingTable], bool]
    ) -> RoutingTable:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            table = await controller.table(self.seen, 0.5)
            if table is not None:
                assert table.version > self.seen
                self.seen = table.version
                if condition(table):
                    return table
        raise AssertionError("the table never showed it")


@pytest.fixture
async def fixture() -> AsyncIterator[Fixture]:
    made = Fixture()
    try:
        yield made
    finally:
        for controller in made.controllers:
            await controller.end()


def all_ready(table: RoutingTable) -> bool:
    return all(worker.state == "ready" for worker in table.workers)


async def test_every_expert_gets_a_home_and_every_worker_is_told(fixture: Fixture) -> None:
    controller = await fixture.controller()
    first = await controller.table(0, 1.0)
    assert first
    assert [worker.state for worker in first.workers] == ["starting", "starting"]
    assert first.max_model_len is None
    table = await fixture.until(controller, all_ready)
    assert [home.workers for home in table.experts] == [["worker-1"], ["worker-0"], ["worker-0"]]
    for home in table.experts:
        assert [w.id for w in table.ready_workers(home.served_name)] == home.workers
    assert (table.bundle, table.base_name, table.max_model_len) == ("0123456789ab", "base", 512)


async def test_a_worker_that_began_anew_is_told_again(fixture: Fixture) -> None:
    controller = await fixture.controller()
    await fixture.until(controller, all_ready)
    fixture.workers["worker-1"].restart()
    await fixture.until(controller, lambda table: table.workers[1].state == "starting")
    table = await fixture.until(controller, all_ready)
    assert fixture.workers["worker-1"].told == 2
    assert fixture.workers["worker-0"].told == 1
    assert len(table.workers[1].experts) == 1


async def test_a_lost_worker_is_down_and_the_others_are_not(fixture: Fixture) -> None:
    controller = await fixture.controller()
    await fixture.until(controller, all_ready)
    fixture.workers["worker-0"].lost = True
    table = await fixture.until(controller, lambda table: table.workers[0].state == "down")
    lost, other = table.workers
    assert (lost.url, lost.experts, lost.detail) == (None, [], "its process is gone")
    assert other.state == "ready"
    assert table.experts[1].workers == ["worker-0"], "its experts stay at home"
    fixture.workers["worker-0"].lost = False
    await fixture.until(controller, all_ready)


async def test_a_silent_worker_is_down_only_after_a_while(fixture: Fixture) -> None:
    controller = await fixture.controller()
    await fixture.until(controller, all_ready)
    fixture.workers["worker-0"].silent = True
    began = time.monotonic()
    table = await fixture.until(controller, lambda table: table.workers[0].state == "down")
    assert time.monotonic() - began >= RULES.silence_s / 2
    assert table.workers[0].detail == "it does not answer"
    assert table.workers[1].state == "ready"


async def test_a_worker_never_heard_of_is_told_from_a_silent_one(fixture: Fixture) -> None:
    fixture.workers["worker-0"].silent = True
    table = await fixture.until(
        await fixture.controller(), lambda table: table.workers[0].state == "down"
    )
    assert table.workers[0].detail == module.UNBORN


async def test_no_news_is_told_as_none(fixture: Fixture) -> None:
    controller = await fixture.controller()
    table = await fixture.until(controller, all_ready)
    assert await controller.table(table.version, 0.1) is None


async def test_a_new_controller_goes_on_from_the_last_table(fixture: Fixture) -> None:
    last = await fixture.until(await fixture.controller(), all_ready)
    await fixture.controllers[0].end()
    fixture.workers["worker-0"].silent = True
    successor = await fixture.controller(last)
    assert await successor.table(last.version, 0.2) is None, "no news: nobody seems lost"
    assert await successor.table(0, 0.2) == last
    fixture.workers["worker-0"].lost = True
    fixture.workers["worker-0"].silent = False
    table = await fixture.until(successor, lambda table: table.workers[0].state == "down")
    assert table.version == last.version + 1
    assert table.max_model_len == last.max_model_len
    assert [worker.told for worker in fixture.workers.values()] == [1, 1]


async def test_one_that_was_told_nothing_says_so() -> None:
    with pytest.raises(NotBegunError):
        await Controller().table(0, 1.0)


async def test_told_twice_it_goes_on_as_it_was(fixture: Fixture) -> None:
    controller = await fixture.controller()
    before = await fixture.until(controller, all_ready)
    await controller.direct(Orders(DEPLOYMENT), fixture.posts(), RULES)
    assert await controller.table(before.version, 0.1) is None


async def test_experts_of_a_lost_worker_get_a_shelter_and_go_home_again(fixture: Fixture) -> None:
    fixture.rules = replace(RULES, move_after_s=0.05, settle_s=0.1)
    controller = await fixture.controller()
    before = await fixture.until(controller, all_ready)
    lost = before.experts[1].workers
    (other,) = set(fixture.workers) - set(lost)
    fixture.workers[lost[0]].lost = True
    sheltered = await fixture.until(
        controller, lambda table: bool(table.ready_workers(before.experts[1].served_name))
    )
    assert [home.workers for home in sheltered.experts] == [[other], [*lost, other], [*lost, other]]
    fixture.workers[lost[0]].lost = False
    fixture.workers[lost[0]].restart()
    after = await fixture.until(
        controller, lambda table: table.experts == before.experts and all_ready(table)
    )
    for home in after.experts:
        assert after.ready_workers(home.served_name)


async def test_a_worker_that_is_gone_for_good_loses_its_experts_to_the_others(
    fixture: Fixture,
) -> None:
    controller = await fixture.controller()
    await fixture.until(controller, all_ready)
    del fixture.workers["worker-0"]
    await controller.direct(Orders(DEPLOYMENT), fixture.posts(), RULES)
    table = await fixture.until(
        controller, lambda table: all(table.ready_workers(e.served_name) for e in table.experts)
    )
    assert [worker.id for worker in table.workers] == ["worker-1"]
    assert [home.workers for home in table.experts] == [["worker-1"]] * 3


async def test_a_worker_that_joins_is_told_and_listed(fixture: Fixture) -> None:
    controller = await fixture.controller()
    await fixture.until(controller, all_ready)
    fixture.workers["worker-2"] = FakeWorker("worker-2")
    await controller.direct(Orders(DEPLOYMENT), fixture.posts(), RULES)
    table = await fixture.until(
        controller, lambda table: len(table.workers) == 3 and all_ready(table)
    )
    assert {home.workers[0] for home in table.experts} == set(fixture.workers)


async def test_a_busy_expert_gets_more_homes(fixture: Fixture) -> None:
    fixture.rules = replace(RULES, policy=Policy(max_replicas=2))
    controller = await fixture.controller()
    await fixture.until(controller, all_ready)
    await controller.demand({"expert-0002": 2.0})
    table = await fixture.until(controller, lambda table: len(table.experts[2].workers) == 2)
    await fixture.until(
        controller, lambda table: len(table.ready_workers(table.experts[2].served_name)) == 2
    )
    assert table.experts[2].id == "expert-0002"


async def test_the_next_bundle_is_held_beside_the_served_one(fixture: Fixture) -> None:
    controller = await fixture.controller()
    await fixture.until(controller, all_ready)
    new = following("b" * 12, changed=[0])
    await controller.direct(Orders(DEPLOYMENT, new), fixture.posts(), RULES)
    name = new.experts[0].name
    table = await fixture.until(controller, lambda table: bool(table.ready_workers(name)))
    assert (table.bundle, table.canary and table.canary.share) == (DEPLOYMENT.bundle, 0.0)
    for home in table.experts:
        assert table.ready_workers(home.served_name)
    await controller.direct(Orders(new, retiring=DEPLOYMENT), fixture.posts(), RULES)
    table = await fixture.until(controller, lambda table: table.bundle == new.bundle)
    assert table.canary is None
    assert table.place == new.place
    assert table.ready_workers(DEPLOYMENT.experts[0].name), "its last requests go on"
    await controller.direct(Orders(new), fixture.posts(), RULES)
    await fixture.until(
        controller, lambda table: not table.ready_workers(DEPLOYMENT.experts[0].name)
    )


async def test_a_controller_that_begins_lets_requests_end_where_an_expert_was_a_moment_ago(
    fixture: Fixture,
) -> None:
    fixture.rules = replace(RULES, drain_s=3600)
    before = await fixture.until(await fixture.controller(), all_ready)
    for controller in fixture.controllers:
        await controller.end()
    name = before.experts[0].served_name
    (other,) = set(fixture.workers) - set(before.experts[0].workers)
    worker = fixture.workers[other]
    assert worker.assigned is not None
    worker.assigned = (*worker.assigned, name)  # the table before this one had it there
    await fixture.controller(last=before)
    told = worker.told
    async with asyncio.timeout(60):
        while worker.asked < 20:  # noqa: ASYNC110 - it is asked elsewhere
            await asyncio.sleep(0.01)
    assert (worker.told, name in worker.assigned) == (told, True)
