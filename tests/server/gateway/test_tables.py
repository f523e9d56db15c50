"""Following the table's file."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.gateway import tables
from server.gateway.tables import TableFile
from server.table import RoutingTable, write_table
from tests.server.gateway.conftest import make_table, make_worker


@pytest.fixture
async def following(tmp_path: Path) -> AsyncIterator[tuple[Path, asyncio.Queue[RoutingTable]]]:
    path = tmp_path / "table.json"
    seen: asyncio.Queue[RoutingTable] = asyncio.Queue()

    async def follow() -> None:
        async for table in TableFile(path, interval_s=0.01).follow():
            seen.put_nowait(table)

    task = asyncio.create_task(follow())
    try:
        yield path, seen
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def complaints(caplog: pytest.LogCaptureFixture, count: int) -> None:
    """Wait until so many tables could not be read; a moment later they are no more."""

    def told() -> int:
        return len([r for r in caplog.records if "cannot be read" in r.message])

    async with asyncio.timeout(60):
        while told() < count:  # noqa: ASYNC110 - a log has no event for it
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    assert told() == count


def put(path: Path, content: bytes) -> None:
    """Whole at once: the file is read by another thread."""
    new = path.with_name("new")
    new.write_bytes(content)
    new.rename(path)


async def test_each_table_comes_once(
    following: tuple[Path, asyncio.Queue[RoutingTable]],
) -> None:
    path, seen = following
    await asyncio.sleep(0.05)
    assert seen.empty()
    for version in (1, 2, 3):
        table = make_table(version, make_worker(0, "http://host:1", []))
        write_table(path, table)
        assert await asyncio.wait_for(seen.get(), 60) == table
    await asyncio.sleep(0.05)
    assert seen.empty()


async def test_a_table_that_cannot_be_read_is_passed_over(
    following: tuple[Path, asyncio.Queue[RoutingTable]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, seen = following
    write_table(path, make_table(1))
    assert (await asyncio.wait_for(seen.get(), 60)).version == 1
    put(path, b'{"version": "none"}')
    await complaints(caplog, 1)
    put(path, b'"\xff')
    await complaints(caplog, 2)
    path.unlink()
    await asyncio.sleep(0.05)
    assert seen.empty()
    write_table(path, make_table(2))
    assert (await asyncio.wait_for(seen.get(), 60)).version == 2


async def test_a_table_that_could_not_be_opened_is_read_later(
    following: tuple[Path, asyncio.Queue[RoutingTable]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when a crowd of clients has taken every file descriptor."""
    path, seen = following
    with monkeypatch.context() as patch:

        def fail(_: Path) -> RoutingTable:
            raise OSError(errno.EMFILE, "Too many open files")

        patch.setattr(tables, "read_table", fail)
        write_table(path, make_table(1))
        await complaints(caplog, 1)
        assert seen.empty()
    assert (await asyncio.wait_for(seen.get(), 60)).version == 1
