"""Micro-batching: order, gathering, errors and cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.gateway.batching import QUIET_TURNS, Batcher, QueueFullError, TurnBatcher


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


class Doubling:
    """Doubles numbers; refuses negative ones; waits at a gate that a test may close."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        self.begun.set()
        assert self.gate.wait(60)
        if any(number < 0 for number in numbers):
            raise ValueError("negative")
        return [2 * number for number in numbers]


@pytest.fixture
def doubling(executor: ThreadPoolExecutor) -> Iterator[Doubling]:
    """Whatever becomes of the test, the executor's thread does not stay at the gate."""
    made = Doubling()
    try:
        yield made
    finally:
        made.gate.set()


async def test_what_waits_is_computed_together(
    executor: ThreadPoolExecutor, doubling: Doubling
) -> None:
    batcher = Batcher(doubling, executor, limit=32, most_waiting=64)
    doubling.gate.clear()
    first = asyncio.create_task(batcher([1]))
    assert await asyncio.to_thread(doubling.begun.wait, 60)
    rest = [asyncio.create_task(batcher([n, n + 100])) for n in range(10)]
    await asyncio.sleep(0)  # now they wait
    doubling.gate.set()
    assert await first == [2]
    assert await asyncio.gather(*rest) == [[2 * n, 2 * n + 200] for n in range(10)]
    assert [len(batch) for batch in doubling.batches] == [1, 20]


async def test_the_limit_holds_but_a_call_is_never_split(
    executor: ThreadPoolExecutor, doubling: Doubling
) -> None:
    batcher = Batcher(doubling, executor, limit=3, most_waiting=64)
    calls = [[1], [2, 3], [4, 5], [6, 7, 8, 9], [10]]
    assert await asyncio.gather(*(batcher(call) for call in calls)) == [
        [2 * n for n in call] for call in calls
    ]
    assert doubling.batches == [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]


async def test_an_error_reaches_its_callers_and_nobody_after(
    executor: ThreadPoolExecutor,
) -> None:
    batcher = Batcher(Doubling(), executor, limit=32, most_waiting=64)
    results = await asyncio.gather(batcher([1]), batcher([-1]), return_exceptions=True)
    assert [type(result) for result in results] == [ValueError, ValueError]
    assert await batcher([4]) == [8]


async def test_a_cancelled_call_costs_the_others_nothing(
    executor: ThreadPoolExecutor, doubling: Doubling
) -> None:
    batcher = Batcher(doubling, executor, limit=32, most_waiting=64)
    doubling.gate.clear()
    running = asyncio.create_task(batcher([1]))
    assert await asyncio.to_thread(doubling.begun.wait, 60)
    waiting, other = asyncio.create_task(batcher([2])), asyncio.create_task(batcher([3]))
    await asyncio.sleep(0)
    running.cancel()
    waiting.cancel()
    await asyncio.sleep(0)
    doubling.gate.set()
    assert await other == [6]
    assert doubling.batches == [[1], [3]]


async def test_the_loop_turns_while_a_batch_is_computed(
    executor: ThreadPoolExecutor, doubling: Doubling
) -> None:
    batcher = Batcher(doubling, executor, limit=32, most_waiting=64)
    doubling.gate.clear()
    call = asyncio.create_task(batcher([1]))
    for _ in range(10):
        await asyncio.sleep(0.001)
    assert not call.done()
    doubling.gate.set()
    assert await call == [2]


async def test_a_queue_that_is_full_refuses_at_once(
    executor: ThreadPoolExecutor, doubling: Doubling
) -> None:
    batcher = Batcher(doubling, executor, limit=1, most_waiting=1)
    doubling.gate.clear()
    first = asyncio.create_task(batcher([1]))
    assert await asyncio.to_thread(doubling.begun.wait, 60)
    waiting = asyncio.create_task(batcher([2]))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await batcher([3])
    doubling.gate.set()
    assert await asyncio.gather(first, waiting) == [[2], [4]]


async def test_several_calls_wait_for_company_as_long_as_any_comes(
    executor: ThreadPoolExecutor, doubling: Doubling
) -> None:
    batcher = Batcher(doubling, executor, limit=32, most_waiting=64)
    calls = [asyncio.create_task(batcher([n])) for n in range(2)]
    for number in range(2, 8):
        for _ in range(QUIET_TURNS // 2):
            await asyncio.sleep(0)
        calls.append(asyncio.create_task(batcher([number])))
    assert await asyncio.gather(*calls) == [[2 * n] for n in range(8)]
    assert doubling.batches == [list(range(8))]
    full = Batcher(doubling, executor, limit=3, most_waiting=64)
    calls = [asyncio.create_task(full([n])) for n in range(4)]
    await asyncio.gather(*calls)
    assert doubling.batches[1:] == [[0, 1, 2], [3]], "a whole batch waits for nobody"


async def test_a_lone_call_waits_for_nobody(
    executor: ThreadPoolExecutor, doubling: Doubling
) -> None:
    batcher = Batcher(doubling, executor, limit=32, most_waiting=64)
    doubling.gate.clear()
    call = asyncio.create_task(batcher([1]))
    for _ in range(4):
        await asyncio.sleep(0)
    assert doubling.begun.wait(60), "handed to the thread by now"
    doubling.gate.set()
    assert await call == [2]


@pytest.fixture
def quick(doubling: Doubling) -> TurnBatcher[int, int]:
    return TurnBatcher(doubling, limit=4)


async def test_what_is_quick_is_computed_for_a_turn_together(
    quick: TurnBatcher[int, int], doubling: Doubling
) -> None:
    assert await asyncio.gather(*(quick([n]) for n in range(3))) == [[0], [2], [4]]
    assert await quick([5]) == [10]
    assert await asyncio.gather(*(quick([n]) for n in range(6))) == [[2 * n] for n in range(6)]
    assert doubling.batches == [[0, 1, 2], [5], [0, 1, 2, 3], [4, 5]]


async def test_other_work_has_its_turn_between_the_batches_of_one_call(
    quick: TurnBatcher[int, int], doubling: Doubling
) -> None:
    seen = []

    async def others() -> None:
        while not call.done():
            seen.append(len(doubling.batches))
            await asyncio.sleep(0)

    call = asyncio.create_task(quick(range(10)))
    await asyncio.gather(others(), call)
    assert call.result() == [2 * n for n in range(10)]
    assert {1, 2} <= set(seen)
    assert await quick([]) == []


async def test_an_error_of_a_turn_reaches_its_callers_and_nobody_after(
    quick: TurnBatcher[int, int],
) -> None:
    results = await asyncio.gather(quick([1]), quick([-1, 2]), return_exceptions=True)
    assert [type(result) for result in results] == [ValueError, ValueError]
    assert await quick([4]) == [8]


async def test_a_call_that_is_cancelled_in_its_turn_is_not_computed(
    quick: TurnBatcher[int, int], doubling: Doubling
) -> None:
    calls = [asyncio.create_task(quick([n])) for n in range(2)]
    asyncio.get_running_loop().call_soon(calls[0].cancel)
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert done[1] == [2]
    assert doubling.batches == [[1]]
