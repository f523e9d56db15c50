"""Batches as a user has them: `introvert serve` on real engines, asked with the official client."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai.types import Batch

from configs.schema import RunConfig

pytest.importorskip("server.batch.job")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

READY_S = 400.0
BATCH_S = 240.0
"""They end hangs, and say nothing of speed."""
OVER = ("completed", "failed", "cancelled", "expired")
TEXTS = ("which herbs go well with a roasted chicken?", "how do I sort a list in Python?")
EXPERTS = {"expert-0000", "expert-0001", "expert-0002"}


@pytest.fixture(scope="module")
def server(
    world: Any,
    serve: Callable[[RunConfig, Path], Any],
    tmp_path_factory: pytest.TempPathFactory,
    left_behind: Callable[[], list[str]],
) -> Iterator[Any]:
    work = tmp_path_factory.mktemp("batches")
    command = serve(world.config(work), work)
    try:
        command.wait_ready(READY_S)
        yield command
        command.press_ctrl_c()
        assert command.process.wait(120) == 0, command.errors
        assert not left_behind()
    finally:
        command.close()


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def lines(count: int, max_tokens: int = 8) -> bytes:
    rows = []
    for number in range(count):
        body = {
            "model": "introvert",
            "messages": [{"role": "user", "content": TEXTS[number % 2]}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        url = "/v1/chat/completions"
        rows.append({"custom_id": f"{number}", "method": "POST", "url": url, "body": body})
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def begin(client: openai.OpenAI, content: bytes) -> Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"test": "yes"},
    )


def wait(client: openai.OpenAI, batch: Batch, holds: Callable[[Batch], bool]) -> Batch:
    deadline = time.monotonic() + BATCH_S
    while not holds(batch):
        assert time.monotonic() < deadline, batch
        assert batch.status not in OVER, batch
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    return batch


def answers(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    text = client.files.content(file_id).text
    return [json.loads(line) for line in text.splitlines()]


def test_a_batch(client: openai.OpenAI) -> None:
    content = lines(40) + b'{"custom_id": "bad", "method": "POST", "url": "/v1/none", "body": {}}\n'
    batch = begin(client, content)
    batch = wait(client, batch, lambda b: b.status == "completed")
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 41, "completed": 40, "failed": 1}
    rows = answers(client, batch.output_file_id)
    assert {row["custom_id"] for row in rows} == {str(number) for number in range(40)}
    assert len(rows) == 40
    for row in rows:
        assert row["response"]["status_code"] == 200
        assert row["response"]["body"]["model"].partition("@")[0] in EXPERTS
        assert row["response"]["body"]["usage"]["completion_tokens"] == 8
    (failure,) = answers(client, batch.error_file_id)
    assert failure["custom_id"] == "bad"
    assert batch.id in [b.id for b in client.batches.list()]
    assert batch.output_file_id in [f.id for f in client.files.list(purpose="batch_output")]


def test_a_batch_that_is_cancelled_keeps_what_is_finished(client: openai.OpenAI) -> None:
    batch = begin(client, lines(4000, max_tokens=64))
    batch = wait(
        client, batch, lambda b: b.request_counts is not None and b.request_counts.completed > 0
    )
    client.batches.cancel(batch.id)
    batch = wait(client, batch, lambda b: b.status == "cancelled")
    assert batch.request_counts is not None
    assert 0 < batch.request_counts.completed < 4000
    rows = answers(client, batch.output_file_id)
    assert len(rows) == batch.request_counts.completed == len({row["custom_id"] for row in rows})


def test_a_killed_runner_is_followed_by_another_that_goes_on(
    client: openai.OpenAI, server: Any
) -> None:
    batch = begin(client, lines(600, max_tokens=16))
    batch = wait(
        client, batch, lambda b: b.request_counts is not None and b.request_counts.completed > 0
    )
    children = psutil.Process(server.process.pid).children()
    (runner,) = [child for child in children if "server.batch.runner" in child.cmdline()]
    runner.kill()
    runner.wait(60)
    batch = wait(client, batch, lambda b: b.status == "completed")
    rows = answers(client, batch.output_file_id)
    assert {row["custom_id"] for row in rows} == {str(number) for number in range(600)}
    assert len(rows) == 600


def test_live_requests_are_answered_beside_a_batch(client: openai.OpenAI) -> None:
    batch = begin(client, lines(400, max_tokens=32))
    batch = wait(
        client, batch, lambda b: b.request_counts is not None and b.request_counts.completed > 0
    )
    for text in TEXTS:
        answer = client.chat.completions.create(
            model="introvert", messages=[{"role": "user", "content": text}], max_tokens=8
        )
        assert answer.model.partition("@")[0] in EXPERTS
    wait(client, batch, lambda b: b.status == "completed")
