"""The gateway as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn

from server.gateway import __main__ as main
from server.table import write_table
from tests.server.gateway.conftest import (
    SPORT,
    StartEngine,
    chat,
    make_config,
    make_table,
    make_worker,
)


@dataclass
class Process:
    """A gateway process and what it has told."""

    process: asyncio.subprocess.Process
    fact: dict[str, str]

    @property
    def url(self) -> str:
        return self.fact["url"]

    async def ended(self) -> tuple[int, list[dict[str, Any]]]:
        """Exit code and log."""
        async with asyncio.timeout(60):
            assert self.process.stderr is not None
            log = (await self.process.stderr.read()).splitlines()
            return await self.process.wait(), [json.loads(line) for line in log]


@contextlib.asynccontextmanager
async def gateway_process(directory: Path, **options: Any) -> AsyncIterator[Process]:
    config = directory / "config.json"
    config.write_text(make_config(**options).model_dump_json())
    table = directory / "table.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server.gateway", "--config", str(config), "--table", str(table)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        yield Process(process, json.loads(line))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def router_has_failed(http: aiohttp.ClientSession, url: str) -> None:
    """Wait until the gateway says that its router cannot be loaded."""
    message = ""
    async with asyncio.timeout(60):
        while "cannot be loaded" not in message:
            async with http.post(f"{url}/v1/chat/completions", json=chat("introvert")) as response:
                assert response.status == 503
                message = (await response.json())["error"]["message"]
            await asyncio.sleep(0.1)


async def test_it_serves_the_table_file_and_ends_with_its_parent(
    tmp_path: Path, start_engine: StartEngine
) -> None:
    engine = await start_engine()
    write_table(tmp_path / "table.json", make_table(1, make_worker(0, engine.url, [SPORT])))
    async with gateway_process(tmp_path) as gateway, aiohttp.ClientSession() as http:
        async with http.get(f"{gateway.url}/health") as response:
            assert response.status == 200
        async with asyncio.timeout(60):
            status = 503
            while status == 503:
                async with http.post(
                    f"{gateway.url}/v1/chat/completions", json=chat("expert-0000")
                ) as response:
                    status = response.status
                await asyncio.sleep(0.02)
        assert status == 200
        # The router is loaded in a thread meanwhile: an early end would cut that short.
        await router_has_failed(http, gateway.url)
        assert gateway.process.stdin is not None
        gateway.process.stdin.close()
        code, log = await gateway.ended()
    assert code == 0
    assert {"time", "level", "logger", "message"} <= log[0].keys()
    # There is no bundle here: said in the log, while explicit models were served all along.
    assert any("the router cannot be loaded" in line["message"] for line in log)


async def test_running_requests_are_finished_on_sigterm(
    tmp_path: Path, start_engine: StartEngine
) -> None:
    goes_on = asyncio.Event()
    engine = await start_engine(tokens=20, token_delay_s=0.02, first_token_only=goes_on)
    write_table(tmp_path / "table.json", make_table(1, make_worker(0, engine.url, [SPORT])))
    async with gateway_process(tmp_path) as gateway, aiohttp.ClientSession() as http:
        async with asyncio.timeout(60):
            while True:
                response = await http.post(
                    f"{gateway.url}/v1/chat/completions", json=chat("expert-0000", stream=True)
                )
                if response.status == 200:
                    break
                response.close()
                await asyncio.sleep(0.02)
        gateway.process.send_signal(signal.SIGTERM)
        goes_on.set()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
        code, _ = await gateway.ended()
    assert code == 0


async def test_draining_ends(tmp_path: Path, start_engine: StartEngine) -> None:
    engine = await start_engine(behaviour="wait")
    write_table(tmp_path / "table.json", make_table(1, make_worker(0, engine.url, [SPORT])))
    async with (
        gateway_process(tmp_path, drain_timeout_s=0.5) as gateway,
        aiohttp.ClientSession() as http,
    ):

        async def ask() -> None:
            while not engine.seen:
                async with http.post(
                    f"{gateway.url}/v1/chat/completions", json=chat("expert-0000")
                ):
                    pass
                await asyncio.sleep(0.02)

        asking = asyncio.create_task(ask())
        try:
            await asyncio.wait_for(engine.arrived.wait(), 60)
            gateway.process.send_signal(signal.SIGTERM)
            code, _ = await gateway.ended()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
    assert code == 0
    await asyncio.wait_for(engine.left.wait(), 60)


async def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with gateway_process(tmp_path, port=port) as gateway:
            code, log = await gateway.ended()
    assert code == 1
    assert f"port {port} on 127.0.0.1 is taken" in gateway.fact["error"]
    assert log[-1]["message"] == gateway.fact["error"]


async def test_an_address_of_another_machine_is_told(tmp_path: Path) -> None:
    async with gateway_process(tmp_path, host="192.0.2.1") as gateway:
        code, _ = await gateway.ended()
    assert code == 2
    assert "gateway.host" in gateway.fact["error"]


async def test_it_settles_once_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    async def start(*_: object) -> None:
        done.append("started")

    monkeypatch.setattr(uvicorn.Server, "startup", start)
    monkeypatch.setattr(main, "settle", lambda: done.append("settled"))
    await main.Server(uvicorn.Config(app="none"), url="").startup()
    assert done == ["started", "settled"]


def test_importing_it_brings_in_no_framework() -> None:
    heavy = "{'ray', 'torch', 'vllm', 'transformers', 'faiss', 'sentence_transformers'}"
    code = f"import server.gateway.__main__, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
