"""What `introvert batch` refuses before anything is started, and what it says in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.batch_view import words
from deploy.cli import main
from server.batch import engines
from server.batch.types import Counts


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("engines were started")

    monkeypatch.setattr(engines, "BatchEngines", refuse)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    config = {
        "bundle": {"path": str(tmp_path / "bundle")},
        "base": {"model": "unused"},
        "data": {"train": ["unused.jsonl"]},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return tmp_path


def batch(here: Path, source: str = "in.jsonl", output: str = "out.jsonl", *more: str) -> int:
    files = ["--input", str(here / source), "--output", str(here / output)]
    return main(["batch", str(here / "config.yaml"), *files, *more])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.jsonl",), "no such file"),
        (("in.jsonl", "out.csv"), "only .jsonl, .parquet"),
        (("in.jsonl", "in.jsonl/out.jsonl"), "cannot be written"),
        (("in.jsonl", "out.jsonl", "--errors", "errors.txt"), "written as .jsonl"),
        (("in.jsonl", "out.jsonl", "--concurrency", "0"), "at least 1"),
        (("in.jsonl", "out.jsonl", "--default", "top_k"), "FIELD=VALUE"),
        (("in.jsonl", "in.jsonl"), "there already"),
        (("in.jsonl", "out.jsonl", "--work", "/proc/none/work"), "cannot be made"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_started(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert batch(here, *arguments) == 2
    assert words in capsys.readouterr().err


def test_progress_tells_speed_errors_and_what_is_left() -> None:
    counts = Counts(
        total=1000,
        done=400,
        failed=2,
        phase="answering",
        tokens=8000,
        finished_before=2,
        seconds={"answering": 10.0},
    )
    assert words(counts) == (
        "answering: 402 of 1,000 lines, 2 errors, 40.0 lines/s, 800 tokens/s, 0:00:14 left"
    )
