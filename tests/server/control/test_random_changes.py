"""Whatever happens during changes: no table mixes versions, none leaves an expert out."""

from __future__ import annotations

import asyncio
import random

import pytest

from server.control.change import OVER
from server.control.errors import ChangeError
from server.control.publisher import Publisher
from server.orders import Deployment
from server.table import ExpertHome
from tests.server.control.conftest import CONFIG, FakePlane, reached
from tests.server.fake_workers import DEPLOYMENT, following

BUNDLES = [DEPLOYMENT, *(following(letter * 12, [i]) for i, letter in enumerate("bcd"))]
STEPS = 25


def of(deployment: Deployment) -> list[tuple[str, str]]:
    return [(expert.id, expert.name) for expert in deployment.experts]


def listed(homes: list[ExpertHome]) -> list[tuple[str, str]]:
    return [(home.id, home.served_name) for home in homes]


@pytest.mark.parametrize("seed", range(6))
async def test_every_table_is_of_one_bundle_and_serves_all_of_it(
    plane: FakePlane, seed: int
) -> None:
    chance = random.Random(seed)
    publisher = Publisher(plane, CONFIG, plane.gather)
    for bundle in BUNDLES:
        plane.add(bundle)
    plane.bundles["/bundles/served"] = DEPLOYMENT
    places = [bundle.place or "/bundles/served" for bundle in BUNDLES]
    try:
        for _ in range(STEPS):
            try:
                match chance.randrange(6):
                    case 0 | 1:
                        publisher.begin(chance.choice(places), chance.choice([None, 0.3]))
                    case 2:
                        publisher.promote()
                    case 3:
                        publisher.abort()
                    case 4:
                        await plane.restart_controller()
                    case 5:
                        worker = chance.choice(list(plane.workers.values()))
                        name = chance.choice(chance.choice(BUNDLES[1:]).experts).name
                        served = {e.name for e in plane.orders.served.experts}
                        worker.refuses = {} if name in served else {name: "damaged"}
            except ChangeError:
                pass  # asked at the wrong time: said so, and nothing happened
            await asyncio.sleep(chance.choice([0.0, 0.01, 0.05]))
        change = publisher.document["change"]
        if change and change["state"] not in OVER:
            state = (await reached(publisher, "canary", *OVER))["state"]
            if state == "canary":
                publisher.promote()
                await reached(publisher)
    finally:
        await publisher.end()
    by_version = {bundle.bundle: bundle for bundle in BUNDLES}
    for before, after in zip(plane.tables, plane.tables[1:], strict=False):
        assert after.version > before.version
    for table in plane.tables:
        assert listed(table.experts) == of(by_version[table.bundle])
        if table.canary:
            assert listed(table.canary.experts) == of(by_version[table.canary.bundle])
    seen = next(i for i, t in enumerate(plane.tables) if all(w.state == "ready" for w in t.workers))
    for table in plane.tables[seen:]:
        for expert in table.experts:
            answered = table.ready_workers(expert.served_name)
            assert answered or expert.served_name in table.refused_experts()
