from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from server.control.change import Change
from server.control.errors import (
    BadChangeError,
    ChangeRunningError,
    ForbiddenPlaceError,
    NoChangeError,
)
from server.control.publisher import Publisher
from server.table import RoutingTable
from tests.server.control.conftest import CONFIG, FakePlane, FakeReport, reached
from tests.server.fake_workers import DEPLOYMENT, following

NEW = following("b" * 12)
OLD_NAMES = {expert.name for expert in DEPLOYMENT.experts}
NEW_NAMES = {expert.name for expert in NEW.experts}


def loaded(table: RoutingTable) -> set[str]:
    return {name for worker in table.workers for name in worker.experts}


async def test_a_bundle_takes_the_place_of_the_served_one(
    plane: FakePlane, publisher: Publisher
) -> None:
    assert publisher.begin(plane.add(NEW)).state == "loading"
    change = await reached(publisher)
    assert (change["state"], change["bundle"], change["detail"]) == ("done", NEW.bundle, "")
    assert (change["verified"], change["total"], change["refused"]) == (3, 3, {})
    assert publisher.document["current"] == {"bundle": NEW.bundle, "place": NEW.place}
    assert loaded(plane.table) == NEW_NAMES
    assert plane.remembered == NEW.place


async def test_before_the_switch_all_is_loaded_and_after_it_the_old_stays_for_its_requests(
    plane: FakePlane, publisher: Publisher
) -> None:
    plane.report.in_flight_bundles = {DEPLOYMENT.bundle: 1}
    publisher.begin(plane.add(NEW))
    await reached(publisher, "draining")
    first = next(table for table in plane.tables if table.bundle == NEW.bundle)
    assert loaded(first) == OLD_NAMES | NEW_NAMES
    await asyncio.sleep(0.1)
    assert loaded(plane.table) == OLD_NAMES | NEW_NAMES
    plane.report.in_flight_bundles = {}
    assert (await reached(publisher))["state"] == "done"
    assert loaded(plane.table) == NEW_NAMES


async def test_a_refused_expert_is_named_and_nothing_new_stays(
    plane: FakePlane, publisher: Publisher
) -> None:
    (victim, *_) = NEW_NAMES
    for worker in plane.workers.values():
        worker.refuses[victim] = "it is truncated"
    publisher.begin(plane.add(NEW))
    change = await reached(publisher)
    assert (change["state"], change["refused"]) == ("refused", {victim: "it is truncated"})
    assert change["detail"] == "1 of 3 experts are refused"
    assert plane.table.bundle == DEPLOYMENT.bundle
    assert plane.table.canary is None
    assert loaded(plane.table) == OLD_NAMES
    assert not any(worker.refused for worker in plane.table.workers)
    assert plane.remembered == ""


async def test_a_router_that_a_gateway_cannot_load_refuses_the_bundle(
    plane: FakePlane, publisher: Publisher
) -> None:
    plane.report.broken = {NEW.bundle: "failed: centroids.safetensors is missing"}
    publisher.begin(plane.add(NEW))
    change = await reached(publisher)
    assert change["state"] == "refused"
    assert "centroids.safetensors is missing" in change["detail"]
    assert loaded(plane.table) == OLD_NAMES


async def test_a_canary_answers_its_share_until_it_is_promoted(
    plane: FakePlane, publisher: Publisher
) -> None:
    publisher.begin(plane.add(NEW), 0.25)
    assert (await reached(publisher, "canary"))["share"] == 0.25
    assert plane.table.bundle == DEPLOYMENT.bundle
    assert plane.table.canary
    assert (plane.table.canary.share, plane.table.canary.place) == (0.25, NEW.place)
    publisher.promote()
    assert (await reached(publisher))["state"] == "done"
    assert plane.table.bundle == NEW.bundle


async def test_a_canary_can_be_taken_back(plane: FakePlane, publisher: Publisher) -> None:
    publisher.begin(plane.add(NEW), 0.25)
    await reached(publisher, "canary")
    publisher.abort()
    change = await reached(publisher)
    assert (change["state"], change["share"]) == ("aborted", 0.0)
    assert loaded(plane.table) == OLD_NAMES
    with pytest.raises(NoChangeError):
        publisher.abort()


async def test_one_change_at_a_time(plane: FakePlane, publisher: Publisher) -> None:
    publisher.begin(plane.add(NEW), 0.5)
    with pytest.raises(ChangeRunningError, match="promote or abort"):
        publisher.begin(plane.add(NEW))
    await reached(publisher, "canary")
    publisher.abort()
    await reached(publisher)
    publisher.begin(plane.add(NEW))
    assert (await reached(publisher))["state"] == "done"


async def test_what_is_served_already_needs_no_change(
    plane: FakePlane, publisher: Publisher
) -> None:
    publisher.begin(plane.add(replace(DEPLOYMENT, place="/bundles/served")))
    change = await reached(publisher)
    assert (change["state"], change["detail"]) == ("done", "it was served already")


async def test_a_place_without_a_bundle_is_refused(plane: FakePlane, publisher: Publisher) -> None:
    publisher.begin("/bundles/nothing")
    change = await reached(publisher)
    assert (change["state"], change["detail"]) == ("refused", "/bundles/nothing holds no bundle")


async def test_nonsense_is_refused_at_once(publisher: Publisher) -> None:
    with pytest.raises(ForbiddenPlaceError):
        publisher.begin("/etc/passwd")
    for share in (0.0, 1.0, -1.0, 2.0):
        with pytest.raises(BadChangeError):
            publisher.begin("/bundles/next", share)
    with pytest.raises(NoChangeError):
        publisher.promote()
    assert publisher.document["change"] is None


async def test_a_controller_that_dies_in_the_middle_goes_on(
    plane: FakePlane, publisher: Publisher
) -> None:
    plane.report.broken = {NEW.bundle: "loading"}
    publisher.begin(plane.add(NEW))
    await plane.until(lambda table: loaded(table) >= NEW_NAMES, 60)
    await plane.restart_controller()
    plane.report.broken = {}
    assert (await reached(publisher))["state"] == "done"
    assert loaded(plane.table) == NEW_NAMES


@pytest.mark.parametrize(("served", "state"), [(DEPLOYMENT, "aborted"), (NEW, "done")])
async def test_a_new_control_process_says_what_became_of_a_change(
    plane: FakePlane, served: object, state: str
) -> None:
    if served is NEW:
        plane.orders = replace(plane.orders, served=NEW)
    last = Change(bundle=NEW.bundle, place=NEW.place, state="switching", share=0.5)
    change = Publisher(plane, CONFIG, plane.gather, last).document["change"]
    assert (change["state"], change["share"]) == (state, 0.0)
    assert "the control process died during it" in change["detail"]


async def test_gateways_that_cannot_be_asked_at_the_end_hold_up_no_later_change(
    plane: FakePlane, publisher: Publisher
) -> None:
    publisher.begin(plane.add(NEW), 0.5)
    await reached(publisher, "canary")

    async def broken() -> list[FakeReport]:
        raise ValueError("no report")

    publisher._gather = broken
    publisher.promote()
    change = await reached(publisher)
    assert (change["state"], change["detail"]) == ("done", "an unforeseen ValueError: no report")
    assert plane.table.bundle == NEW.bundle
