"""Waiting for a worker: in its lane, for a home to come back, or elsewhere by spilling.

Only requests that cannot go to a worker at once come here. The order in which they are let in is
`server.gateway.admission`'s business; this module knows tasks and time.
"""

from __future__ import annotations

import asyncio
import math
import time

from router.types import Route
from server.gateway.admission import Group
from server.gateway.errors import QueueFullError, QueueTimeoutError
from server.gateway.observation import Spill
from server.gateway.parts import Parts
from server.gateway.passage import Passage
from server.gateway.views import Home, Target

LOOK_AGAIN_S = 0.5
"""Seconds after which a request without a home looks for one, whether or not a table has come."""

MAX_RETRY_AFTER_S = 60


async def wait_for_worker(
    parts: Parts, passage: Passage, home: Home | None, tried: set[str]
) -> tuple[Home, Group]:
    """A home that has let the request in, and the ticket to leave its lane with.

    A routed request may get another target on the way, if the wait for its own is too long.

    Args:
        parts: of the gateway.
        passage: the request; its `target` may change, with `observation.spill` saying so.
        home: where it could not enter at once; none: there was no home.
        tried: workers that gave it no answer; forgotten when it has waited for a home.

    Raises:
        QueueFullError: too many wait already.
        QueueTimeoutError: it waited for as long as it may.
        NoEngineError: no home came back, or none will.
    """
    began = time.perf_counter()
    if passage.patient_until is None:
        passage.patient_until = began + parts.config.queue_timeout_s
    try:
        while True:
            assert passage.target is not None
            wait = _expected_wait(parts, passage, home)
            if (spilled := _spill(parts, passage, wait)) is not None:
                passage.target, passage.observation.spill = spilled
                tried.clear()
            elif home is None:
                await _wait_for_home(parts, passage)
                tried.clear()
            elif (ticket := await _wait_in_lane(parts, passage, home)) is not None:
                return home, ticket
            home = parts.chooser.choose(passage.target, passage.key, tried, patient=True)
            if home is not None and (ticket := home.lane.enter(passage.target.lane_name)):
                return home, ticket
    finally:
        passage.observation.queue_s += time.perf_counter() - began


async def _wait_for_home(parts: Parts, passage: Passage) -> None:
    """Wait until there may be a home again."""
    assert passage.target is not None
    assert passage.patient_until is not None
    chooser = parts.chooser
    left = passage.patient_until - time.perf_counter()
    if left <= 0 or chooser.hopeless(passage.target):
        raise chooser.no_engine(passage.target)
    if chooser.homeless >= parts.config.max_queue:
        raise _queue_full(parts.config.retry_after_s)
    chooser.homeless += 1
    try:
        await chooser.change(min(left, LOOK_AGAIN_S))
    finally:
        chooser.homeless -= 1


async def _wait_in_lane(parts: Parts, passage: Passage, home: Home) -> Group | None:
    """A ticket of the lane; none if its worker has changed, so that a home is to be chosen anew."""
    target, tenant, lane = passage.target, passage.tenant, home.lane
    assert target is not None
    assert passage.patient_until is not None
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake(_: Group | None = None) -> None:
        if not future.done():
            future.set_result(None)

    waiter = lane.queue(target.lane_name, tenant.name, tenant.weight, wake)
    if waiter is None:
        if passage.wanted is not None:  # what is refused is wanted all the same
            parts.chooser.demand[passage.wanted] += lane.service_s
        raise _queue_full(lane.expected_wait(target.lane_name))
    timer = loop.call_later(passage.patient_until - time.perf_counter(), wake)
    try:
        parts.prefetch.consider(home)
        await future
    except BaseException:
        if waiter.ticket is not None:
            lane.leave(waiter.ticket)
        lane.abandon(waiter)
        parts.prefetch.consider(home)
        raise
    finally:
        timer.cancel()
    if waiter.waiting:
        lane.abandon(waiter)
        parts.prefetch.consider(home)
        retry_after_s = parts.config.retry_after_s
        raise QueueTimeoutError(
            f"The request waited {parts.config.queue_timeout_s:g} s for a worker that holds "
            f"'{target.served_name}'. Try again in {retry_after_s} s, or use another model.",
            retry_after_s=retry_after_s,
        )
    if waiter.ticket is not None:
        parts.prefetch.entered(home)
    return waiter.ticket


def _expected_wait(parts: Parts, passage: Passage, home: Home | None) -> float:
    """Seconds until the request's target could take it; without a home nobody knows."""
    assert passage.target is not None
    if home is None:
        return math.inf
    return home.lane.expected_wait(passage.target.lane_name)


def _spill(parts: Parts, passage: Passage, wait: float) -> tuple[Target, Spill] | None:
    """Where a routed request goes instead, if that saves more than `gateway.spill_wait_s`."""
    cost, route = parts.config.spill_wait_s, passage.observation.route
    target, view = passage.target, passage.view
    assert target is not None
    assert view is not None
    if cost is None or route is None or wait <= cost:
        return None
    if target.expert is None or passage.observation.spill:
        return None
    others: list[tuple[Target, Spill]] = []
    for expert in runners_up(route, passage.threshold):
        runner_up = view.by_expert.get(expert)
        if runner_up is not None and runner_up is not target:
            others.append((runner_up, "runner-up"))
    others.append((view.base, "base"))
    for other, kind in others:
        theirs = parts.chooser.expected_wait(other)
        if theirs is None or not passage.tenant.may_ask(other.label):
            continue
        if theirs + cost < wait:
            return other, kind
    return None


def runners_up(route: Route, threshold: float | None) -> list[str]:
    """Experts that the router would have chosen next, none that it would have abstained from."""
    if threshold is None:
        return []
    return [c.expert for c in route.top[1:] if c.score >= threshold]


def _queue_full(wait_s: float) -> QueueFullError:
    retry_after_s = min(max(1, math.ceil(wait_s)), MAX_RETRY_AFTER_S)
    return QueueFullError(
        f"As many requests wait for this model as may. Try again in {retry_after_s} s, or use "
        "another model.",
        retry_after_s=retry_after_s,
    )
