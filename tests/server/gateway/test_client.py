"""A request's lifeline cuts it short when its client hangs up, and not once it is over."""

from __future__ import annotations

import asyncio

import pytest

from server.gateway.client import Lifeline
from server.gateway.hang_up import Watchers


async def test_a_hang_up_cuts_the_request_short() -> None:
    watchers: Watchers = set()
    task = asyncio.create_task(asyncio.sleep(60))
    lifeline = Lifeline(watchers, task)
    (told,) = watchers
    told()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lifeline.end == "gone"


async def test_what_is_over_is_told_of_no_hang_up() -> None:
    watchers: Watchers = set()
    task = asyncio.create_task(asyncio.sleep(0))
    lifeline = Lifeline(watchers, task)
    lifeline.stop()
    assert not watchers
    await task
    assert lifeline.end == ""
