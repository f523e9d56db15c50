"""`introvert batch` on engines of its own: every line once, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import BASE_NAME, EXPERTS, INTROVERT, TOPICS, World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

COUNT = 120
LIMIT_S = 240.0


def write_input(path: Path) -> None:
    rows: list[dict[str, Any]] = []
    things = [thing for topic in TOPICS for thing in topic]
    for number in range(COUNT):
        text = f"a short introduction to {things[number % len(things)]}"
        options = {"max_tokens": 150, "temperature": 0, "ignore_eos": True}
        if number % 3 == 0:
            body = {"model": "introvert", "messages": [{"role": "user", "content": text}]}
            rows.append({"custom_id": f"id-{number}", "url": "/v1/chat/completions"})
            rows[-1]["body"] = {**body, **options}
        else:
            rows.append({"custom_id": f"id-{number}", "prompt": text, **options})
    rows[4]["model"] = BASE_NAME
    rows[5]["model"] = "expert-0001"
    rows[7]["max_tokens"] = -1
    rows[8]["prompt"] = "long " * 400
    rows[9]["body"] |= {"n": 2, "temperature": 1.0}
    path.write_text("\n".join([*map(json.dumps, rows), "{broken"]) + "\n")


def command(world: World, here: Path, output: str) -> list[str]:
    config = here / "config.json"
    config.write_text(world.config(here / "work").model_dump_json())
    arguments = ["--input", here / "in.jsonl", "--output", here / output, "--in-order"]
    return [str(part) for part in (INTROVERT, "batch", config, *arguments)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(path: Path) -> dict[str, list[str]]:
    """What was answered, by id."""
    return {
        row["custom_id"]: [
            choice.get("text") or choice["message"]["content"]
            for choice in row["response"]["body"]["choices"]
        ]
        for row in rows_of(path)
        if row["custom_id"] != "id-9"  # which is drawn by lot
    }


def check(here: Path, output: str) -> None:
    rows = rows_of(here / output)
    errors = rows_of(here / output.replace(".jsonl", ".errors.jsonl"))
    assert [row["custom_id"] for row in rows] == [
        f"id-{n}" for n in range(COUNT) if n not in (7, 8)
    ]
    assert [error["introvert"]["line"] for error in errors] == [8, 9, COUNT + 1]
    assert [error["custom_id"] for error in errors] == ["id-7", "id-8", None]
    by_id = {row["custom_id"]: row for row in rows}
    assert by_id["id-4"]["introvert"]["expert"] == "base"
    assert by_id["id-5"]["introvert"]["expert"] == "expert-0001"
    assert len(by_id["id-9"]["response"]["body"]["choices"]) == 2
    experts = set()
    for row in rows:
        expert, version = row["introvert"]["expert"], row["introvert"]["version"]
        experts.add(expert)
        model = row["response"]["body"]["model"]
        assert model == (BASE_NAME if expert == "base" else f"{expert}@{version}")
    assert len(experts) == EXPERTS + 1


def test_what_is_killed_costs_no_line_and_changes_no_answer(
    world: World, tmp_path: Path, left_behind: Callable[[], list[str]]
) -> None:
    write_input(tmp_path / "in.jsonl")
    undisturbed = subprocess.run(
        command(world, tmp_path, "calm.jsonl"),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert f"{COUNT - 2} answered" in undisturbed.stdout
    check(tmp_path, "calm.jsonl")
    assert left_behind() == []

    killed = subprocess.Popen(
        command(world, tmp_path, "stormy.jsonl"), stderr=subprocess.PIPE, text=True
    )
    try:
        _until(killed, "waiting for engines")
        os.kill(killed.pid, signal.SIGKILL)
    finally:
        killed.kill()
        killed.communicate()
    gone = time.monotonic() + 60
    while left_behind() and time.monotonic() < gone:
        time.sleep(0.2)
    assert left_behind() == []
    assert (tmp_path / "stormy.jsonl.work").is_dir()

    again = subprocess.Popen(
        command(world, tmp_path, "stormy.jsonl"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _until(again, "answering")
        (pid_file,) = (tmp_path / "work" / "logs").glob("worker-0-*.pid")
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        output, errors = again.communicate(timeout=LIMIT_S)
    finally:
        again.kill()
        again.communicate()
    assert again.returncode == 0, errors
    assert "(1 of them before)" in output  # the line that is no JSON was done with
    check(tmp_path, "stormy.jsonl")
    assert texts_of(tmp_path / "stormy.jsonl") == texts_of(tmp_path / "calm.jsonl")
    assert not (tmp_path / "stormy.jsonl.work").exists()
    assert left_behind() == []


def _until(driver: subprocess.Popen[str], words: str) -> None:
    """Read what a driver says until it says that."""
    assert driver.stderr
    said = []
    for line in driver.stderr:
        said.append(line)
        if words in line:
            return
    raise AssertionError("".join(said))
