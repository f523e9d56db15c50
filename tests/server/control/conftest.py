"""A control plane without Ray: the real controller over workers without a process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from configs.schema import RunConfig
from expert_trainer.errors import NotPublishedError
from server import caretaker
from server.control import publisher as publisher_module
from server.control.change import OVER, Change
from server.control.publisher import Publisher
from server.controller import Controller
from server.orders import Deployment, Orders, Post
from server.table import RoutingTable
from tests.server.fake_workers import DEPLOYMENT, RULES, FakeWorker

CONFIG = RunConfig.model_validate(
    {
        "bundle": {"path": "/bundles/served"},
        "base": {"model": "/base"},
        "data": {"train": ["x.jsonl"]},
        "serving": {"drain_timeout_s": 5.0, "startup_timeout_s": 30},
    }
)


@dataclass
class FakeReport:
    """A gateway process that follows the table and has every router that it names."""

    plane: FakePlane
    process: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    in_flight_bundles: dict[str, int] = field(default_factory=dict)
    demand: dict[str, float] = field(default_factory=dict)

    @property
    def table_version(self) -> int:
        return self.plane.table.version

    @property
    def routers(self) -> dict[str, str]:
        table = self.plane.table
        bundles = [table.bundle, *([table.canary.bundle] if table.canary else [])]
        return {bundle: self.broken.get(bundle, "ready") for bundle in bundles}


class FakePlane:
    """What `ControlPlane` is, the controller in this process."""

    def __init__(self, names: Sequence[str] = ("worker-0", "worker-1")) -> None:
        self.workers = {name: FakeWorker(name) for name in names}
        self.orders = Orders(DEPLOYMENT)
        self.tables: list[RoutingTable] = []
        self.bundles: dict[str, Deployment] = {}
        self.remembered: str = ""
        self.change: Change | None = None
        self.report = FakeReport(self)
        self.controller = Controller()
        self._news = asyncio.Condition()
        self._pump: asyncio.Task[None] | None = None

    @property
    def table(self) -> RoutingTable:
        return self.tables[-1]

    async def begin(self) -> None:
        await self.order(self.orders)
        table = await self.controller.table(0, 1.0)
        assert table
        self.tables.append(table)
        self._pump = asyncio.create_task(self._keep())

    async def end(self) -> None:
        if self._pump:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        await self.controller.end()

    async def restart_controller(self) -> None:
        """As when the actor dies, and is told its orders again."""
        await self.controller.end()
        self.controller = Controller()
        await self.order(self.orders)

    async def order(self, orders: Orders) -> None:
        self.orders = orders
        posts = {name: Post(name, w, "127.0.0.1", True) for name, w in self.workers.items()}
        last = self.tables[-1] if self.tables else None
        await self.controller.direct(orders, posts, RULES, last)

    async def until(
        self, condition: Callable[[RoutingTable], bool], timeout_s: float | None
    ) -> RoutingTable:
        async with asyncio.timeout(timeout_s), self._news:
            await self._news.wait_for(lambda: condition(self.table))
            return self.table

    def open(self, place: str) -> Any:
        if place not in self.bundles:
            raise NotPublishedError(f"{place} holds no bundle")
        return SimpleNamespace(manifest=SimpleNamespace(version=self.bundles[place].bundle))

    def describe(self, bundle: Any, place: str) -> Deployment:
        return self.bundles[place]

    def remember(self, place: str, bundle: Any) -> None:
        self.remembered = place

    def remember_change(self, change: Change) -> None:
        self.change = change

    async def gather(self) -> list[FakeReport]:
        return [self.report]

    def add(self, deployment: Deployment) -> str:
        self.bundles[deployment.place] = deployment
        return deployment.place

    async def _keep(self) -> None:
        while True:
            try:
                table = await self.controller.table(self.table.version, 0.05)
            except Exception:  # noqa: BLE001 - it is being restarted
                await asyncio.sleep(0.01)
                continue
            if table is not None:
                async with self._news:
                    self.tables.append(table)
                    self._news.notify_all()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker, "POLL_S", 0.005)
    monkeypatch.setattr(caretaker, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(publisher_module, "REPORT_POLL_S", 0.005)


@pytest.fixture
async def plane() -> AsyncIterator[FakePlane]:
    made = FakePlane()
    try:
        await made.begin()
        await made.until(lambda t: all(worker.state == "ready" for worker in t.workers), 60)
        yield made
    finally:
        await made.end()


@pytest.fixture
async def publisher(plane: FakePlane) -> AsyncIterator[Publisher]:
    made = Publisher(plane, CONFIG, plane.gather)
    try:
        yield made
    finally:
        await made.end()


async def reached(publisher: Publisher, *states: str) -> dict[str, Any]:
    """The change once it is in one of the states, or over."""
    async with asyncio.timeout(60):
        while True:
            change: dict[str, Any] = publisher.document["change"]
            if change["state"] in (states or OVER):
                return change
            assert change["state"] not in OVER, change
            await asyncio.sleep(0.005)
