from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from server.batch.backlog import SUSPECT, Backlog
from server.batch.ledger import Entry, Ledger
from server.batch.types import Line


def fill(ledger: Ledger, sizes: list[int]) -> None:
    targets = [f"e{i}" for i, size in enumerate(sizes) for _ in range(size)]
    ledger.add(
        [
            Entry(n, 0, n, f"id-{n}", "/p", target, None, b"{}")
            for n, target in enumerate(targets, 1)
        ]
    )


def test_a_group_stays_with_its_expert_and_others_get_others(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        fill(ledger, [6, 5, 1])
        lines = Backlog(ledger)
        first = lines.take("a", None, 4)
        second = lines.take("b", None, 4)
        assert {line.target for line in first} == {"e0"}
        assert {line.target for line in second} == {"e1"}
        assert [line.target for line in lines.take("a", None, 2)] == ["e0", "e0"]
        assert lines.take("c", frozenset({"e2"}), 4)[0].target == "e2"
        assert lines.take("c", frozenset({"e2"}), 4) == []


def test_a_block_is_filled_from_the_next_experts_one_after_the_other(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        fill(ledger, [2, 3, 1, 9])
        lines = Backlog(ledger)
        held = frozenset({"e0", "e1", "e2"})
        assert [line.target for line in lines.take("a", held, 4)] == ["e1"] * 3 + ["e0"]
        assert [line.target for line in lines.take("a", held, 4)] == ["e0", "e2"]


def test_suspects_come_apart_in_smaller_and_smaller_blocks(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        fill(ledger, [64])
        lines = Backlog(ledger)
        taken = lines.take("a", None, 64)
        sizes = []
        for losses in range(SUSPECT, SUSPECT + 4):
            for line in taken:
                line.losses = losses
                lines.give_back(line)
            taken = lines.take("a", None, 64)
            sizes.append(len(taken))
            rest = []
            while more := lines.take("a", None, 64):
                rest += more
            lines.done(len(rest))
        assert sizes == [16, 4, 1, 1]


class Pending:
    """A ledger as far as a backlog asks it, a few lines at a time."""

    def __init__(self, targets: list[str]) -> None:
        self._targets = targets

    def remaining(self) -> dict[str, int]:
        return Counter(self._targets)

    def to_ask(self, target: str, after: int, limit: int) -> list[Line]:
        numbers = [n for n, t in enumerate(self._targets, 1) if t == target and n > after]
        return [Line(n, 0, n, f"id-{n}", "/p", target, b"{}", None) for n in numbers[:7]]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_every_line_is_handed_out_until_it_is_over_and_once_at_a_time(
    data: st.DataObject, sizes: list[int]
) -> None:
    waiting = [f"e{i}" for i, size in enumerate(sizes) for _ in range(size)]
    lines = Backlog(Pending(waiting))
    in_hand: dict[int, Line] = {}
    over: set[int] = set()
    while not lines.over:
        group = data.draw(st.sampled_from("ab"))
        for line in lines.take(group, None, data.draw(st.integers(1, 9))):
            assert line.number not in in_hand
            assert line.number not in over
            in_hand[line.number] = line
        chosen = (
            st.lists(st.sampled_from(sorted(in_hand)), unique=True, min_size=1)
            if in_hand
            else st.just([])
        )
        for number in data.draw(chosen):
            line = in_hand.pop(number)
            if line.losses < 5 and data.draw(st.integers(0, 3)) == 0:
                line.losses += 1
                lines.give_back(line)
            else:
                over.add(number)
                lines.done()
    assert over == set(range(1, len(waiting) + 1))
