"""What gateway processes have in common."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.gateway import shared
from server.gateway.shared import SharedCounts, SharedRates, clear_row


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[SharedCounts]]:
    with contextlib.ExitStack() as stack:
        made = [SharedCounts(tmp_path / "counts", processes=3, number=n) for n in range(3)]
        for one in made:
            stack.callback(one.close)
        yield made


def test_counts_add_up_over_processes(three: list[SharedCounts]) -> None:
    for number, counts in enumerate(three):
        for _ in range(number + 1):
            counts.add("worker-0", 1)
    three[2].add("worker-1", 1)
    assert [counts.of("worker-0") for counts in three] == [6, 6, 6]
    assert [counts.of("worker-1") for counts in three] == [1, 1, 1]
    assert [counts.of("worker-2") for counts in three] == [0, 0, 0]
    three[2].add("worker-0", -1)
    three[2].add("worker-1", -1)
    assert three[0].of("worker-0") == 5
    assert three[2].own() == {"worker-0": 2}


def test_a_dead_process_leaves_nothing_behind(three: list[SharedCounts], tmp_path: Path) -> None:
    three[1].add("worker-0", 1)
    three[0].add("worker-0", 1)
    assert three[2].of("worker-0") == 2
    clear_row(tmp_path / "counts", 1)
    assert three[2].of("worker-0") == 1
    again = SharedCounts(tmp_path / "counts", processes=3, number=1)
    try:
        assert three[0].of("worker-0") == 1
        again.add("worker-0", 1)
        assert three[0].of("worker-0") == 2
    finally:
        again.close()


def test_a_process_that_begins_anew_does_not_count_what_it_had(
    three: list[SharedCounts], tmp_path: Path
) -> None:
    three[1].add("worker-0", 5)
    assert three[0].of("worker-0") == 5
    SharedCounts(tmp_path / "counts", processes=3, number=1).close()
    assert three[0].of("worker-0") == 0


def test_names_at_zero_make_room(
    three: list[SharedCounts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "ROW_NAMES", 4)
    three[0].add("stays", 1)
    for number in range(20):
        three[0].add(f"passes-{number}", 1)
        assert three[1].of(f"passes-{number}") == 1
        three[0].add(f"passes-{number}", -1)
    assert three[1].of("stays") == 1
    assert three[1].of("passes-3") == 0


def test_a_real_process_counts_too(three: list[SharedCounts], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from server.gateway.shared import SharedCounts\n"
        "SharedCounts(Path(sys.argv[1]), processes=3, number=1).add('worker-0', 7)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "counts")], check=True, timeout=120)
    assert three[0].of("worker-0") == 7


def test_a_rate_holds_over_processes(tmp_path: Path) -> None:
    one, other = SharedRates(tmp_path / "rates"), SharedRates(tmp_path / "rates")
    try:
        now = 1000.0
        waits = [rates.ask("alice", 4, now) for rates in (one, other, one, other, one, other)]
        assert waits == [0, 0, 0, 0, 15, 15], "a minute's worth at once, then evenly"
        assert other.ask("bob", 4, now) == 0
        assert one.ask("alice", 4, now + 15) == 0
        assert other.ask("alice", 4, now + 15) == 15
        assert [one.ask("slow", 0.5, now) for _ in range(2)] == [0, 120]
    finally:
        one.close()
        other.close()


def test_a_lock_that_is_never_released_stops_nobody(tmp_path: Path) -> None:
    rates = SharedRates(tmp_path / "rates")
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "rates")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with (tmp_path / "rates").open("r+b") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert [rates.ask("alice", 1, 1000.0) for _ in range(2)] == [0, 60]
    finally:
        holder.kill()
        holder.communicate()
        rates.close()
