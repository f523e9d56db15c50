"""The slots of an engine, as the gateway sees them."""

from __future__ import annotations

from server.gateway.residency import Residency


def test_the_one_used_longest_ago_gives_way() -> None:
    slots = Residency(2)
    assert [slots.touch(name) for name in ("a", "b", "a", "c", "a", "b")] == [
        True,
        True,
        False,
        True,
        False,
        True,
    ]
    assert "c" not in slots
    assert len(slots) == 2


def test_what_was_not_copied_in_after_all_is_in_no_slot() -> None:
    slots = Residency(2)
    slots.touch("a")
    slots.forget("a")
    slots.forget("never there")
    assert slots.touch("a")
