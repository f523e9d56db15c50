"""The whole job with a backend that echoes: every line ends once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.batch import dispatch
from server.batch.errors import BatchError
from server.batch.job import has_begun, run_job
from server.batch.types import Counts, JobSpec
from tests.server.batch.fakes import EchoBackend

WORDS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PAUSE_S", 0.001)
    monkeypatch.setattr(dispatch, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(dispatch, "LOOK_S", 0.01)


def write_input(path: Path, count: int) -> None:
    rows = [{"custom_id": f"id-{i}", "prompt": f"{WORDS[i % 3]} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def spec_of(here: Path, **more: Any) -> JobSpec:
    return JobSpec(
        inputs=(str(here / "in.jsonl"),),
        output=str(here / "out.jsonl"),
        errors=str(here / "err.jsonl"),
        work=here / "work",
        **more,
    )


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


async def run(spec: JobSpec, backend: EchoBackend) -> Counts:
    async with asyncio.timeout(60):
        return await run_job(spec, backend, lambda _: None)


async def test_every_line_is_answered_once_by_its_expert(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 700)
    backend = EchoBackend({"one": None, "two": None}, block=16)
    counts = await run(spec_of(tmp_path, in_order=True, defaults={"max_tokens": 3}), backend)
    assert (counts.total, counts.done, counts.failed) == (700, 700, 0)
    assert counts.tokens == 3 * 700
    rows = rows_of(spec_of(tmp_path).output)
    assert [row["custom_id"] for row in rows] == [f"id-{i}" for i in range(700)]
    for i, row in enumerate(rows):
        assert row["response"]["body"]["model"] == f"expert-{WORDS[i % 3]}@v1"
        assert row["response"]["body"]["asked"]["max_tokens"] == 3
        assert row["introvert"]["expert"] == f"expert-{WORDS[i % 3]}"
        assert row["introvert"]["line"] == i + 1
    assert not has_begun(tmp_path / "work")
    assert rows_of(spec_of(tmp_path).errors) == []


async def test_an_expert_is_asked_in_one_go_before_the_next(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 300)
    backend = EchoBackend(block=10, seats=1)
    await run(spec_of(tmp_path), backend)
    targets = [target for _, target, _ in backend.asked]
    changes = sum(a != b for a, b in itertools.pairwise(targets))
    assert changes == 2


async def test_bad_lines_are_named_and_stop_nobody(tmp_path: Path) -> None:
    lines = [
        json.dumps({"custom_id": "a", "prompt": "red 1"}),
        "{broken",
        json.dumps({"custom_id": "a", "prompt": "red 2"}),
        json.dumps({"custom_id": "b", "prompt": "red 3", "model": "unknown"}),
        json.dumps({"custom_id": "c", "prompt": "red 4"}),
        json.dumps({"custom_id": "d", "text": "?"}),
        json.dumps({"custom_id": "e", "url": "/v1/route", "body": {"input": "blue"}}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    backend = EchoBackend()
    backend.bad = {5}
    counts = await run(spec_of(tmp_path), backend)
    assert (counts.total, counts.done, counts.failed) == (7, 2, 5)
    answered = {row["custom_id"]: row for row in rows_of(spec_of(tmp_path).output)}
    assert answered.keys() == {"a", "e"}
    assert answered["e"]["response"]["body"] == {"routed": True}
    errors = {row["introvert"]["line"]: row for row in rows_of(spec_of(tmp_path).errors)}
    assert {line: row["error"]["code"] for line, row in errors.items()} == {
        2: "invalid_json",
        3: "duplicate_custom_id",
        4: "model_not_found",
        5: "context_length_exceeded",
        6: "unknown_format",
    }
    assert "in.jsonl:1 already" in errors[3]["error"]["message"]


async def test_lines_go_only_where_their_expert_is_held(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 90)
    holds = {
        "one": frozenset({"expert-red@v1", "expert-green@v1"}),
        "two": frozenset({"expert-blue@v1", "expert-green@v1"}),
    }
    backend = EchoBackend(holds)
    await run(spec_of(tmp_path), backend)
    assert all(target in holds[lane] for lane, target, _ in backend.asked)


async def test_a_line_that_takes_engines_along_is_given_up_alone(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 120)
    backend = EchoBackend(block=32)
    backend.poison = {50}
    counts = await run(spec_of(tmp_path), backend)
    assert (counts.done, counts.failed) == (119, 1)
    (row,) = rows_of(spec_of(tmp_path).errors)
    assert (row["error"]["code"], row["custom_id"]) == ("engine_lost", "id-49")


@pytest.mark.parametrize("poison", [set[int](), {5}])
async def test_an_engine_that_is_away_for_long_costs_no_line(
    tmp_path: Path, poison: set[int]
) -> None:
    """Neither lines that it never had, nor suspects of its death."""
    write_input(tmp_path / "in.jsonl", 30)
    backend = EchoBackend(seats=1)
    backend.poison = poison
    ask = backend.ask

    async def dies(lane: str, lines: Any) -> Any:
        async for answer in ask(lane, lines):
            yield answer
        if len(backend.asked) == 4:  # some are suspects by now
            backend.away = 40

    backend.ask = dies  # type: ignore[method-assign]
    counts = await run(spec_of(tmp_path), backend)
    assert (counts.done, counts.failed) == (30 - len(poison), len(poison))


async def test_who_is_away_is_not_asked_without_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PAUSE_S", 0.05)
    monkeypatch.setattr(dispatch, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(dispatch, "SUSPECT", 0)
    write_input(tmp_path / "in.jsonl", 3)
    backend = EchoBackend(seats=1)
    backend.away = 4
    began = time.monotonic()
    assert (await run(spec_of(tmp_path), backend)).done == 3
    assert time.monotonic() - began >= 4 * 0.05


async def test_lines_that_are_put_off_come_again(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 30)
    backend = EchoBackend()
    backend.later = {n: n % 4 for n in range(1, 31)}
    assert (await run(spec_of(tmp_path), backend)).done == 30


async def test_an_expert_that_nobody_will_hold_is_an_error_for_its_lines(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 30)
    backend = EchoBackend({"one": frozenset({"expert-red@v1", "expert-green@v1"})})
    backend.hopeless = {"expert-blue@v1": "its files are not as published"}
    counts = await run(spec_of(tmp_path), backend)
    assert (counts.done, counts.failed) == (20, 10)
    assert {row["error"]["code"] for row in rows_of(spec_of(tmp_path).errors)} == {"expert_refused"}


async def test_a_cancelled_job_keeps_what_is_finished(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 200)
    cancelled = asyncio.Event()

    def listen(counts: Counts) -> None:
        if counts.done >= 20:
            cancelled.set()

    backend = EchoBackend(block=5, pause_s=0.01)
    async with asyncio.timeout(60):
        counts = await run_job(spec_of(tmp_path), backend, listen, cancelled)
    assert 20 <= counts.done < 200
    assert len(rows_of(spec_of(tmp_path).output)) == counts.done


async def test_a_ledger_of_another_job_is_not_touched(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 20)
    spec = spec_of(tmp_path)
    script_until_killed(tmp_path, after=3)
    write_input(tmp_path / "in.jsonl", 21)
    with pytest.raises(BatchError, match="other inputs"):
        await run(spec, EchoBackend())


SCRIPT = """
import asyncio, json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from server.batch import dispatch, intake
from server.batch.job import run_job
from tests.server.batch.fakes import EchoBackend
from tests.server.batch.test_job import spec_of

dispatch.LOOK_S = 0.005
intake.BLOCK_ROWS = 16
class Backend(EchoBackend):
    async def ask(self, lane, lines):
        async for answer in super().ask(lane, lines):
            with open(sys.argv[1] + "/paid", "a") as paid:
                paid.write(f"{{answer.number}}\\n")
            yield answer
asyncio.run(run_job(spec_of(Path(sys.argv[1])), Backend(block=4, pause_s=0.004), lambda c: None))
"""


def start(here: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[3])
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(root=root), str(here)])


def script_until_killed(here: Path, after: int) -> None:
    """The job in a process of its own, killed once so many lines were asked."""
    process = start(here)
    try:
        deadline = time.monotonic() + 60
        paid = here / "paid"
        while not paid.exists() or len(paid.read_text().splitlines()) < after:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_killed_at_random_moments_it_resumes_and_pays_for_little_twice(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 400)
    random_ = random.Random(7)
    paid = tmp_path / "paid"
    for _ in range(6):
        process = start(tmp_path)
        try:
            before = paid.stat().st_size if paid.exists() else 0
            deadline = time.monotonic() + 60
            grown = random_.randint(0, 150)
            while process.poll() is None and time.monotonic() < deadline:
                if paid.exists() and paid.stat().st_size > before + grown:
                    break
                time.sleep(0.001)
        finally:
            process.kill()
            process.wait()
    last = start(tmp_path)
    try:
        assert last.wait(60) == 0
    finally:
        last.kill()
        last.wait()
    rows = rows_of(spec_of(tmp_path).output)
    assert sorted(row["custom_id"] for row in rows) == sorted(f"id-{i}" for i in range(400))
    asked = len(paid.read_text().splitlines())
    assert asked >= 400
    assert asked <= 400 + 6 * 100  # in hand or not written yet, of 400 each time
    assert not (tmp_path / "work").exists()
