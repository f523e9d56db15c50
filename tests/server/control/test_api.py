from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from server.control.api import create_app, listening
from server.control.publisher import Publisher
from server.sockets import reachable
from tests.server.control.conftest import FakePlane, reached
from tests.server.fake_workers import following


@pytest.fixture
def told() -> list[dict[str, float]]:
    """What the control plane is told of demand."""
    return []


@pytest.fixture
async def session(
    publisher: Publisher, tmp_path: Path, told: list[dict[str, float]]
) -> AsyncIterator[aiohttp.ClientSession]:
    path = tmp_path / "control.sock"
    path.touch()  # as a control process that was killed leaves it

    async def demand(rates: Mapping[str, float]) -> None:
        told.append(dict(rates))

    async with listening(create_app(publisher, demand), path):
        assert path.stat().st_mode & 0o777 == 0o600
        with reachable(path) as address:
            async with aiohttp.ClientSession(
                "http://control", connector=aiohttp.UnixConnector(address)
            ) as opened:
                yield opened


async def answer(response: aiohttp.ClientResponse) -> tuple[int, Any]:
    return response.status, await response.json()


async def test_a_bundle_is_published_over_the_socket(
    session: aiohttp.ClientSession, plane: FakePlane, publisher: Publisher
) -> None:
    new = following("b" * 12)
    place = plane.add(new)
    body = {"path": place, "canary": 0.5}
    status, change = await answer(await session.post("/bundle", json=body))
    assert (status, change["state"], change["place"]) == (202, "loading", place)
    await reached(publisher, "canary")
    status, refusal = await answer(await session.post("/bundle", json=body))
    assert (status, refusal["error"]["code"]) == (409, "change_in_progress")
    assert (await session.post("/bundle/promote")).status == 202
    await reached(publisher)
    status, document = await answer(await session.get("/bundle"))
    assert status == 200
    assert document["current"] == {"bundle": new.bundle, "place": place}
    assert document["change"]["state"] == "done"


@pytest.mark.parametrize(
    ("route", "body", "status", "code"),
    [
        ("/bundle", {"path": "/etc"}, 403, "bundle_place_forbidden"),
        ("/bundle", {"path": "/bundles/x", "canary": 3}, 400, "bad_change"),
        ("/bundle", {"path": 3}, 400, "bad_change"),
        ("/bundle", ["path"], 400, "bad_change"),
        ("/bundle/promote", None, 409, "no_change"),
        ("/bundle/abort", None, 409, "no_change"),
        ("/elsewhere", None, 404, "not_found"),
    ],
)
async def test_refusals_have_a_status_and_a_code(
    session: aiohttp.ClientSession, route: str, body: object, status: int, code: str
) -> None:
    found, refusal = await answer(await session.post(route, json=body))
    assert (found, refusal["error"]["code"]) == (status, code)
    assert set(refusal["error"]) == {"message", "type", "param", "code"}


async def test_demand_is_told_and_looked_at_first(
    session: aiohttp.ClientSession, told: list[dict[str, float]]
) -> None:
    status, _ = await answer(await session.post("/demand", json={"rates": {"expert-0001": 0.5}}))
    assert status == 200
    for rates in ({"expert-0001": -1}, {"expert-0001": "much"}, None):
        status, refusal = await answer(await session.post("/demand", json={"rates": rates}))
        assert status == 400
        assert "rates" in refusal["error"]["message"]
    assert told == [{"expert-0001": 0.5}]
