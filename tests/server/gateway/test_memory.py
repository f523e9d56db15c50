"""What stays is not looked at by the garbage collector again, and garbage does not stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from server.gateway.memory import settle, settling


class Node:
    def __init__(self) -> None:
        self.own: object = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_what_is_alive_is_not_looked_at_again() -> None:
    gc.unfreeze()
    kept = Node()
    settle()
    assert gc.get_freeze_count() > 0
    assert not any(each is kept for each in gc.get_objects())


def test_garbage_does_not_stay() -> None:
    gc.disable()
    try:
        gone = weakref.ref(Node())
        assert gone() is not None, "a cycle waits for the collector"
        settle()
    finally:
        gc.enable()
    assert gone() is None


def test_what_comes_later_is_looked_at() -> None:
    settle()
    later = Node()
    assert any(each is later for each in gc.get_objects())


def test_after_the_first_that_loads_it_settles_and_after_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settled: list[None] = []
    monkeypatch.setattr("server.gateway.memory.settle", lambda: settled.append(None))
    load = settling(lambda number, *, by: 12 // number * by)
    with pytest.raises(ZeroDivisionError):
        load(0, by=1)
    assert not settled, "nothing has come yet"
    assert load(3, by=2) == 8
    assert load(4, by=1) == 3
    assert len(settled) == 1
