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
