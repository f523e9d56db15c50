from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.control.plane import ControlPlane
from server.controller import Controller
from server.orders import Orders, Post
from server.table import ENGINE_KEY_FILE, RoutingTable
from tests.server.control.conftest import CONFIG
from tests.server.fake_workers import DEPLOYMENT, FakeWorker


class Remote:
    """A method as an actor's handle has it."""

    def __init__(self, method: Any) -> None:
        self.remote = method


class Handle:
    """A controller in this process, called as an actor is."""

    def __init__(self) -> None:
        self.controller = Controller()

    def __getattr__(self, name: str) -> Remote:
        return Remote(getattr(self.controller, name))


class FakeStaff:
    """Workers that this control process has hired itself."""

    def __init__(self) -> None:
        self.workers = {name: FakeWorker(name) for name in ("worker-0", "worker-1")}
        self.actors = {name: f"{name}-first" for name in self.workers}

    @property
    def posts(self) -> dict[str, Post]:
        return {n: Post(self.actors[n], w, "127.0.0.1") for n, w in self.workers.items()}


@pytest.fixture
def staff() -> FakeStaff:
    return FakeStaff()


@pytest.fixture
def plane(tmp_path: Path, staff: FakeStaff) -> ControlPlane:
    (tmp_path / ENGINE_KEY_FILE).write_text("sesame")
    made: Any = ControlPlane(CONFIG, tmp_path)
    made._staff = staff
    made._orders = Orders(DEPLOYMENT)
    plane: ControlPlane = made
    return plane


async def begun(plane: ControlPlane, handle: Handle) -> RoutingTable:
    """The first table of a controller that Ray has just started."""
    plane._controller = handle
    await plane.order(plane.orders)
    table = await handle.controller.table(0, 1.0)
    assert table
    await plane._note(table)
    return table


async def settled(plane: ControlPlane, handle: Handle) -> RoutingTable:
    """The table once all workers are ready."""
    async with asyncio.timeout(60):
        while any(worker.state != "ready" for worker in plane.table.workers):
            table = await handle.controller.table(plane.table.version, 1.0)
            if table is not None:
                await plane._note(table)
    return plane.table


async def test_a_controller_that_ray_has_started_again_takes_no_worker_out_of_the_table(
    plane: ControlPlane, staff: FakeStaff
) -> None:
    first, second = Handle(), Handle()
    try:
        await begun(plane, first)
        before = await settled(plane, first)
        await first.controller.end()
        assert await begun(plane, second) == before
    finally:
        for handle in (first, second):
            await handle.controller.end()


async def test_what_a_table_says_of_a_dismissed_worker_is_not_its_successor_s(
    plane: ControlPlane, staff: FakeStaff
) -> None:
    first, second = Handle(), Handle()
    try:
        await begun(plane, first)
        await settled(plane, first)
        await first.controller.end()
        staff.actors["worker-1"] = "worker-1-second"
        after = await begun(plane, second)
        assert [worker.state for worker in after.workers] == ["ready", "starting"]
    finally:
        for handle in (first, second):
            await handle.controller.end()
