from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from server.batch import rows
from server.batch.errors import BatchInputError
from server.batch.rows import InputRow, input_files, read_input


def read(*sources: Path | str, after: tuple[int, int] = (0, 0)) -> list[InputRow]:
    return list(read_input(input_files([str(s) for s in sources]), after))


def test_lines_have_their_places_and_blank_ones_are_none(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b"}')
    assert [(r.file, r.line, r.fields) for r in read(file)] == [
        (0, 1, {"prompt": "a"}),
        (0, 3, {"prompt": "b"}),
    ]


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"a": "\\ud800"}x', "\xff"])
def test_a_line_that_is_no_object_is_told_and_stops_nobody(tmp_path: Path, line: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(line.encode("latin-1") + b'\n{"prompt": "b"}\n')
    bad, good = read(file)
    assert (bad.fields, bad.code, bad.line) == (None, "invalid_json", 1)
    assert good.fields == {"prompt": "b"}


def test_a_line_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 32)
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "' + "x" * 200 + '"}\n{"prompt": "b"}\n')
    long, good = read(file)
    assert (long.code, long.line) == ("line_too_long", 1)
    assert (good.fields, good.line) == ({"prompt": "b"}, 2)


def test_reading_goes_on_after_a_place(tmp_path: Path) -> None:
    for name in "ab":
        lines = [json.dumps({"prompt": f"{name}{i}"}) for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    everything = read(tmp_path)
    assert [(r.file, r.line) for r in everything] == [(f, n) for f in (0, 1) for n in (1, 2, 3)]
    for place, row in enumerate(everything):
        assert read(tmp_path, after=(row.file, row.line)) == everything[place + 1 :]


def test_compressed_parquet_and_urls(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"prompt": "zipped", "max_tokens": 2}\n')
    table: dict[str, list[Any]] = {"prompt": ["p", "q"], "max_tokens": [1, None]}
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    found = [r.fields for r in read(tmp_path / "a.jsonl.gz", f"file://{tmp_path}/b.parquet")]
    assert found == [
        {"prompt": "zipped", "max_tokens": 2},
        {"prompt": "p", "max_tokens": 1},
        {"prompt": "q"},
    ]


@pytest.mark.parametrize("source", ["nothing.jsonl", "hub:some/data", "notes.txt", "empty"])
def test_what_cannot_be_read_is_named(tmp_path: Path, source: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    name = source if source.startswith("hub:") else str(tmp_path / source)
    with pytest.raises(BatchInputError, match=source):
        input_files([name])
