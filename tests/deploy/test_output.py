import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.output import ReportError, check_report, results_alone, say, table, write_report


def test_what_libraries_print_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with results_alone():
        print("a library's banner")
        say("a result")
    say("another")
    assert capsys.readouterr() == ("a result\nanother\n", "a library's banner\n")


def test_numbers_stand_right_and_words_left() -> None:
    text = table(["name", "count", "score"], [["a", 1200, 1.234], ["longer", 3, None]])
    assert text.splitlines() == [
        "name    count  score",
        "──────  ─────  ─────",
        "a       1,200   1.23",
        "longer      3      –",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table(["a", "b"], []).splitlines() == ["a  b", "─  ─"]


words = st.text(st.characters(codec="ascii", exclude_categories=("C",)), max_size=12)


@given(st.lists(st.tuples(words, st.integers(), st.floats(allow_nan=False)), max_size=6))
def test_every_column_starts_where_its_rule_starts(rows: list[tuple[str, int, float]]) -> None:
    lines = table(["one", "two", "three"], rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert all(len(line) <= len(lines[1]) for line in lines)


def test_reports_are_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_report(str(target), {"a": 1})
    with pytest.raises(TypeError):
        write_report(str(target), {"a": object()})
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_no_report_is_asked_for(tmp_path: Path) -> None:
    check_report(None)
    write_report(None, {"a": 1})


def test_a_report_into_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is a directory"):
        check_report(str(tmp_path))


def test_a_report_into_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="not a writable directory"):
        check_report(str(tmp_path / "no" / "report.json"))
