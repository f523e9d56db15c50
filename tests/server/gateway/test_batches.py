"""`/v1/files` and `/v1/batches` with the official client, and what it would never send."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from configs.schema import RunConfig
from server.batch.runner import Gateway as AskingGateway
from server.batch.runner import Runner
from server.batch.store import DIRECTORY, Store
from server.gateway import uploads
from server.gateway.seat import Seat
from server.keys import KeyEntry, add_key, digest_of
from server.table import ENGINE_KEY_FILE, TABLE_FILE, RoutingTable, write_table
from tests.server.gateway.conftest import (
    LAW,
    SPORT,
    Gateway,
    House,
    StartGateway,
    make_config,
    make_table,
    make_worker,
)

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "sport"}}


def lines_of(*changes: dict[str, Any]) -> bytes:
    """A file of requests."""
    rows = [{**LINE, "custom_id": f"line-{i}", **change} for i, change in enumerate(changes)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> Gateway:
    return await start_gateway(max_file_bytes=3_000_000, client_timeout_s=1)


@pytest.fixture
async def shared(start_gateway: StartGateway, tmp_path: Path) -> Gateway:
    """Alice and Bob have keys."""
    keys = tmp_path / "keys.yaml"
    for name in ("alice", "bob"):
        add_key(keys, KeyEntry.model_validate({"name": name, "sha256": digest_of(name).hex()}))
    return await start_gateway(keys_file=str(keys))


async def test_files(gateway: Gateway, tmp_path: Path) -> None:
    client = gateway.openai()
    content = lines_of({}, {})
    made = await client.files.create(file=("größe.jsonl", content), purpose="batch")
    assert (made.object, made.bytes, made.purpose) == ("file", len(content), "batch")
    assert (made.filename, made.status) == ("größe.jsonl", "processed")
    assert made.id.startswith("file-")
    other = await client.files.create(file=io.BytesIO(b"{}"), purpose="batch")
    assert (await client.files.retrieve(made.id)) == made
    assert [f.id async for f in client.files.list(limit=1)] == [other.id, made.id]
    page = await client.files.list(order="asc", limit=1, purpose="batch")
    assert ([f.id for f in page.data], page.has_more) == ([made.id], True)
    assert page.model_extra is not None
    assert page.model_extra["first_id"] == page.model_extra["last_id"] == made.id
    assert not (await client.files.list(purpose="batch_output")).data
    assert (await client.files.content(made.id)).content == content
    gone = await client.files.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            await call(made.id)
        assert caught.value.code == "file_not_found"
    assert len(list((tmp_path / DIRECTORY / "files").iterdir())) == 1


async def test_a_file_that_expires(gateway: Gateway, tmp_path: Path) -> None:
    client = gateway.openai()
    made = await client.files.create(
        file=("in.jsonl", lines_of({})),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert made.expires_at == made.created_at + 3600
    assert (await client.files.retrieve(made.id)) == made
    with sqlite3.connect(tmp_path / DIRECTORY / "batches.db") as database:
        database.execute("UPDATE files SET expires_at = created_at")
    database.close()
    assert not (await client.files.list()).data
    for call in (client.files.retrieve, client.files.content):
        with pytest.raises(openai.NotFoundError):
            await call(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.batches.create(
            input_file_id=made.id, endpoint="/v1/completions", completion_window="24h"
        )


async def test_batches(gateway: Gateway) -> None:
    client = gateway.openai()
    file = await client.files.create(file=("in.jsonl", lines_of({})), purpose="batch")
    made = [
        await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window="24h",
            metadata={"number": str(number)},
        )
        for number in range(3)
    ]
    first = made[0]
    assert first.model_dump(exclude_none=True) == {
        "id": first.id,
        "object": "batch",
        "endpoint": "/v1/completions",
        "input_file_id": file.id,
        "completion_window": "24h",
        "status": "validating",
        "created_at": first.created_at,
        "expires_at": first.created_at + 24 * 3600,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": {"number": "0"},
    }
    assert first.id.startswith("batch_")
    assert (await client.batches.retrieve(first.id)) == first
    listed = [b.id async for b in client.batches.list(limit=2)]
    assert listed == [b.id for b in reversed(made)]
    with pytest.raises(openai.ConflictError) as caught:
        await client.files.delete(file.id)
    assert caught.value.code == "file_in_use"
    for batch in made:
        cancelled = await client.batches.cancel(batch.id)
        assert cancelled.status == "cancelled", "nobody had begun it"
    assert (await client.batches.cancel(first.id)).status == "cancelled"
    await client.files.delete(file.id)
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError) as unknown:
            await call("batch_nothing")
        assert unknown.value.code == "batch_not_found"


async def test_what_is_over_cannot_be_cancelled(gateway: Gateway, tmp_path: Path) -> None:
    client = gateway.openai()
    file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/route", completion_window="24h"
    )
    store = Store(tmp_path / DIRECTORY)
    try:
        (record,) = store.open_batches()
        store.begin(record)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        store.finish(record, "completed")
    finally:
        store.close()
    with pytest.raises(openai.ConflictError, match="completed") as caught:
        await client.batches.cancel(batch.id)
    assert caught.value.code == "batch_over"


async def test_each_key_sees_its_own(shared: Gateway) -> None:
    alice, bob = (shared.openai(api_key=name) for name in ("alice", "bob"))
    file = await alice.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    batch = await alice.batches.create(
        input_file_id=file.id, endpoint="/v1/route", completion_window="24h"
    )
    assert not (await bob.files.list()).data
    assert not (await bob.batches.list()).data
    for call in (
        bob.files.retrieve(file.id),
        bob.files.content(file.id),
        bob.files.delete(file.id),
        bob.files.list(after=file.id),
        bob.batches.retrieve(batch.id),
        bob.batches.cancel(batch.id),
        bob.batches.list(after=batch.id),
        bob.batches.create(input_file_id=file.id, endpoint="/v1/route", completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            await call
    with pytest.raises(openai.AuthenticationError):
        await shared.openai(api_key="eve").batches.list()
    with pytest.raises(openai.AuthenticationError):
        await shared.openai(api_key="eve").files.create(file=b"{}", purpose="batch")
    assert (await alice.batches.retrieve(batch.id)).status == "validating"


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"input_file_id": None}, 400, "missing_required_parameter", "input_file_id"),
        ({"input_file_id": 3}, 400, "invalid_type", "input_file_id"),
        ({"input_file_id": "file-x"}, 404, "file_not_found", "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, 400, "invalid_type", "endpoint"),
        ({"completion_window": "1h"}, 400, "invalid_type", "completion_window"),
        ({"metadata": {"a": 1}}, 400, "invalid_type", "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "invalid_type", "metadata"),
        ({"metadata": {"a": "x" * 70_000}}, 413, "request_too_large", None),
    ],
)
async def test_a_batch_that_cannot_be(
    gateway: Gateway, changes: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    body = {
        "input_file_id": "file-x",
        "endpoint": "/v1/route",
        "completion_window": "24h",
        **changes,
    }
    body = {name: value for name, value in body.items() if value is not None}
    got, answer, _ = await gateway.post("/v1/batches", body)
    assert (got, answer["error"]["code"], answer["error"]["param"]) == (status, code, param)


@pytest.mark.parametrize(
    "query",
    ["files?limit=0", "files?limit=x", "files?limit=10001", "files?order=up", "batches?limit=101"],
)
async def test_a_list_that_cannot_be(gateway: Gateway, query: str) -> None:
    status, answer, _ = await gateway.get(f"/v1/{query}")
    assert (status, answer["error"]["code"]) == (400, "invalid_type")


def form(*parts: tuple[str, str | None, bytes]) -> aiohttp.FormData:
    made = aiohttp.FormData(default_to_multipart=True)
    for name, filename, value in parts:
        made.add_field(name, value.decode() if filename is None else value, filename=filename)
    return made


FILE = ("file", "in.jsonl", b"{}\n")
PURPOSE = ("purpose", None, b"batch")


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([FILE], 400, "missing_required_parameter"),
        ([PURPOSE], 400, "missing_required_parameter"),
        ([FILE, ("purpose", None, b"fine-tune")], 400, "invalid_type"),
        ([FILE, FILE, PURPOSE], 400, "invalid_type"),
        ([("file", None, b"{}"), PURPOSE], 400, "invalid_type"),
        ([FILE, ("purpose", None, b"x" * 5000)], 400, "invalid_type"),
        ([FILE, *[("other", None, b"")] * 40, PURPOSE], 400, "invalid_request"),
        ([("file", "in.jsonl", b"x" * 3_000_001), PURPOSE], 413, "file_too_large"),
        ([("file", "in.jsonl", b"x" * 3_000_000), PURPOSE], 200, ""),
        ([PURPOSE, ("expires_after[seconds]", None, b"3600"), FILE], 200, ""),
        ([PURPOSE, ("expires_after[seconds]", None, b"3599"), FILE], 400, "invalid_type"),
        ([PURPOSE, ("expires_after[seconds]", None, b"-1"), FILE], 400, "invalid_type"),
        ([PURPOSE, ("expires_after[anchor]", None, b"now"), FILE], 400, "invalid_type"),
    ],
)
async def test_forms(
    gateway: Gateway,
    tmp_path: Path,
    parts: list[tuple[str, str | None, bytes]],
    status: int,
    code: str,
) -> None:
    async with gateway.http.post(f"{gateway.url}/v1/files", data=form(*parts)) as response:
        answer = await response.json()
        assert response.status == status, answer
    if code:
        assert answer["error"]["code"] == code
    assert len(files_in(tmp_path)) == (status == 200), "what was refused is gone"


def files_in(scratch: Path) -> list[Path]:
    return list((scratch / DIRECTORY / "files").iterdir())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"nothing of the kind"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b'--x\r\ncontent-disposition: form-data; name="a'),
        ("multipart/form-data; boundary=" + "x" * 1000, b"--x--"),
    ],
)
async def test_what_is_no_form(gateway: Gateway, kind: str, body: bytes) -> None:
    status, answer, _ = await gateway.post("/v1/files", body, headers={"content-type": kind})
    assert (status, answer["error"]["code"]) == (400, "invalid_request")


async def test_an_upload_that_stops_half_way_leaves_nothing(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "WRITE_BYTES", 1)
    over = asyncio.Event()

    async def halves() -> AsyncIterator[bytes]:
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nhalf'
        await over.wait()

    kind = {"content-type": "multipart/form-data; boundary=x"}
    try:
        async with gateway.http.post(
            f"{gateway.url}/v1/files", data=halves(), headers=kind
        ) as response:
            assert response.status == 408
        hangs = asyncio.create_task(
            gateway.http.post(f"{gateway.url}/v1/files", data=halves(), headers=kind)
        )
        async with asyncio.timeout(60):
            while not files_in(tmp_path):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        hangs.cancel()
        await asyncio.gather(hangs, return_exceptions=True)
        async with asyncio.timeout(60):
            while files_in(tmp_path):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    finally:
        over.set()


async def test_a_full_disk_is_told(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = gateway.openai()
    opened = Path.open

    def full(path: Path, mode: str = "r", **more: Any) -> Any:
        if path.name.endswith(".part"):
            path.touch()
            return opened(Path("/dev/full"), "wb")
        return opened(path, mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(openai.InternalServerError, match="full") as caught:
            await client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    assert (caught.value.status_code, caught.value.code) == (507, "insufficient_storage")
    assert not files_in(tmp_path)

    def no_page(*_: Any, **__: Any) -> Any:
        with sqlite3.connect(":memory:") as database:
            database.execute("PRAGMA max_page_count = 1")
            database.execute("CREATE TABLE x (y)")

    monkeypatch.setattr(Store, "add_batch", no_page)
    with pytest.raises(openai.InternalServerError, match="full") as caught:
        await client.batches.create(
            input_file_id="file-x", endpoint="/v1/route", completion_window="24h"
        )
    assert (caught.value.status_code, caught.value.code) == (507, "insufficient_storage")


async def test_a_gateway_that_is_started_again_knows_them(start_gateway: StartGateway) -> None:
    first, second = await start_gateway(), await start_gateway()
    file = await first.openai().files.create(file=("in.jsonl", b"{}"), purpose="batch")
    made = await first.openai().batches.create(
        input_file_id=file.id, endpoint="/v1/route", completion_window="24h"
    )
    assert await second.openai().batches.retrieve(made.id) == made
    assert (await second.openai().files.content(file.id)).content == b"{}"


@contextlib.asynccontextmanager
async def runner(
    config: RunConfig, table: RoutingTable, url: str, run_dir: Path
) -> AsyncIterator[None]:
    """The real runner, before the gateway at `url`."""
    (run_dir / ENGINE_KEY_FILE).write_text("of-the-run")
    write_table(run_dir / TABLE_FILE, table)
    store = Store(config.bundle.scratch / DIRECTORY)
    work = AskingGateway(config, run_dir, url)
    task = asyncio.create_task(Runner(store, work, at_once=4, look_s=0.01).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        store.close()


async def test_from_file_to_answers_on_behalf_of_its_key(
    house: House, start_gateway: StartGateway, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    limits = {"requests_per_minute": 1, "experts": ["expert-0000"]}
    entry = {"name": "alice", "sha256": digest_of("alice").hex(), **limits}
    add_key(keys, KeyEntry.model_validate(entry))
    table = make_table(
        1, make_worker(0, house.sport.url, [SPORT]), make_worker(1, house.law.url, [LAW])
    )
    seat = Seat(engine_key="of-the-run")
    gateway = await start_gateway(table, keys_file=str(keys), seat=seat, batch_concurrency=1)
    client = gateway.openai(api_key="alice")
    model = {"model": "introvert", "prompt": "sport"}
    content = lines_of(
        *[{"body": {**model, "prompt": f"sport {i}"}} for i in range(20)],
        {"body": {**model, "model": "expert-0001"}},
        {"url": "/v1/chat/completions"},
    )
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    async with runner(make_config(tmp_path), table, gateway.url, tmp_path):
        async with asyncio.timeout(120):
            while batch.status not in ("completed", "failed"):
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch.errors
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 22, "completed": 20, "failed": 2}
    assert batch.output_file_id
    assert batch.error_file_id
    answers = [
        json.loads(x) for x in (await client.files.content(batch.output_file_id)).text.splitlines()
    ]
    assert {a["custom_id"] for a in answers} == {f"line-{i}" for i in range(20)}
    assert {a["response"]["body"]["model"] for a in answers} == {SPORT}
    failures = [
        json.loads(x) for x in (await client.files.content(batch.error_file_id)).text.splitlines()
    ]
    assert {f["custom_id"] for f in failures} == {"line-20", "line-21"}
    assert not house.law.seen, "the allow-list holds"
    assert len(house.sport.seen) == 20
