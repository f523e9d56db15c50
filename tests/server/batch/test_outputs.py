from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from server.batch.errors import BatchOutputError, LineError
from server.batch.outputs import check_kind, check_outputs, exists, write_output
from server.batch.results import answer_line, fault_line, refused_line
from server.batch.types import Answer, Line

LINE = Line(3, 0, 9, "a", "/v1/completions", "expert-0001@abc", b"{}", 0.25)
WHERE = {"file": "in.jsonl", "line": 9}


def test_an_answer_says_who_answered_and_for_which_line() -> None:
    body = b'{"choices":[{"text":"hi"}]}'
    found = json.loads(answer_line(LINE, Answer(3, 200, body), WHERE))
    assert found["custom_id"] == "a"
    assert found["error"] is None
    assert found["response"]["status_code"] == 200
    assert found["response"]["body"] == json.loads(body)
    assert found["introvert"] == {
        "expert": "expert-0001",
        "version": "abc",
        "route_score": 0.25,
        **WHERE,
    }
    assert answer_line(LINE, Answer(3, 200, body), WHERE) == answer_line(
        LINE, Answer(3, 200, body), WHERE
    )


def test_a_refusal_keeps_the_engines_answer_and_says_why() -> None:
    answer = Answer(3, 400, b'{"error":{"message":"too long","code":"context_length_exceeded"}}')
    found = json.loads(refused_line(LINE, answer, WHERE))
    assert found["response"]["status_code"] == 400
    assert found["error"] == {"code": "context_length_exceeded", "message": "too long"}
    fault = json.loads(fault_line(1, None, LineError("invalid_json", "no"), WHERE))
    assert (fault["response"], fault["introvert"]) == (None, WHERE)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "out.jsonl"
    place.write_text("before\n")

    def broken() -> Iterator[bytes]:
        yield b"{}"
        raise OSError(28, "No space left on device")

    with pytest.raises(BatchOutputError, match="No space left"):
        write_output(str(place), broken(), tmp_path)
    assert place.read_text() == "before\n"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    write_output(str(place), [b"1", b"2"], tmp_path)
    assert place.read_text() == "1\n2\n"


def test_parquet_and_urls(tmp_path: Path) -> None:
    lines = [answer_line(LINE, Answer(3, 200, b'{"choices":[{"text":"hi"}]}'), WHERE)]
    place = f"file://{tmp_path}/out/answers.parquet"
    check_outputs([place], tmp_path, 0)
    write_output(place, lines, tmp_path)
    assert exists(place)
    (row,) = pq.read_table(tmp_path / "out" / "answers.parquet").to_pylist()
    assert (row["custom_id"], row["text"], row["expert"], row["line"]) == (
        "a",
        "hi",
        "expert-0001",
        9,
    )


def test_an_output_that_cannot_be_written_is_found_out_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BatchOutputError, match="cannot be written"):
        check_outputs([str(tmp_path / "file" / "out.jsonl")], tmp_path, 0)
    with pytest.raises(BatchOutputError, match="directory"):
        check_outputs([str(tmp_path)], tmp_path, 0)
    with pytest.raises(BatchOutputError, match="give two files"):
        check_outputs([str(tmp_path / "a"), str(tmp_path / "a")], tmp_path, 0)
    with pytest.raises(BatchOutputError, match="only"):
        check_kind("out.csv")
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BatchOutputError, match="MiB free"):
        check_outputs([str(tmp_path / "out.jsonl")], tmp_path, 0)
