"""The application's life."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import aiohttp

from server.gateway.app import create_app
from server.gateway.routing import LoadedRouter
from server.gateway.seat import Seat
from tests.server.gateway.conftest import (
    SPORT,
    FakeRouter,
    FakeTables,
    make_config,
    make_table,
    make_worker,
    serving,
)


async def test_who_takes_the_place_of_a_dead_process_accepts_nobody_before_it_can_answer(
    tmp_path: Path,
) -> None:
    tables = FakeTables()
    loads = threading.Event()

    def source(_: str) -> LoadedRouter:
        assert loads.wait(60)
        return LoadedRouter(FakeRouter(), "cccccccccccc")

    async def come() -> None:
        """What the dead process had, in the order in which it comes."""
        tables.publish(make_table(1, make_worker(0, "http://127.0.0.1:9", [SPORT])))
        await asyncio.to_thread(time.sleep, 0.2)
        loads.set()

    app = create_app(make_config(), tables, source, Seat(tmp_path, again=True))
    coming = asyncio.create_task(come())
    try:
        async with (
            serving(app) as url,
            aiohttp.ClientSession() as http,
            http.post(f"{url}/v1/route", data=json.dumps({"input": "sport"})) as answer,
        ):
            assert answer.status == 200
    finally:
        loads.set()
        await coming
