from __future__ import annotations

from pathlib import Path

import pytest

from server.batch.errors import BatchBusyError, BatchError
from server.batch.ledger import LEDGER_FILE, Entry, Ledger, Result


def entries(*numbers: int, target: str = "e") -> list[Entry]:
    return [Entry(n, 0, n, f"id-{n}", "/v1/completions", target, 0.5, b"{}") for n in numbers]


def test_lines_are_asked_once_they_are_in_and_no_more_when_over(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add(entries(1, 2, 3), read_to="0:3")
        assert [line.number for line in ledger.to_ask("e", 1, 10)] == [2, 3]
        ledger.finish([Result(2, True, b"two"), Result(3, False, b"three")])
        assert ledger.remaining() == {"e": 1}
        assert ledger.counts() == (3, 1, 1)
    with Ledger(tmp_path) as again:
        assert again.fact("read_to") == "0:3"
        assert [line.number for line in again.to_ask("e", 0, 10)] == [1]
        again.finish([Result(1, True, b"one"), Result(2, True, b"other")])
        assert list(again.contents(ok=True, in_order=False)) == [b"two", b"one"]
        assert list(again.contents(ok=True, in_order=True)) == [b"one", b"two"]
        assert list(again.contents(ok=False, in_order=True)) == [b"three"]


def test_rows_and_how_far_was_read_are_written_both_or_neither(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add(entries(1), read_to="0:1")
        with pytest.raises(BatchError):
            ledger.add(entries(2, 1), read_to="0:2")
        assert (ledger.fact("read_to"), ledger.counts()[0]) == ("0:1", 1)


def test_another_process_is_told_to_wait(tmp_path: Path) -> None:
    with Ledger(tmp_path), pytest.raises(BatchBusyError, match="another process"), Ledger(tmp_path):
        pass
    with Ledger(tmp_path):
        pass


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_bytes(b"no database at all" * 100)
    with pytest.raises(BatchError, match="ledger"), Ledger(tmp_path):
        pass


def test_a_work_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BatchError, match="cannot be written"), Ledger(tmp_path / "file" / "work"):
        pass


def test_ids_are_found_however_many_are_asked_for(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add(entries(*range(1, 1500)))
        known = ledger.known_ids([f"id-{n}" for n in range(1000, 2000)])
        assert len(known) == 500
        assert known["id-1000"] == (0, 1000)
