"""Another set of experts for a running engine: a real one, under load, without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from configs.schema import GatewayConfig, RunConfig
from expert_trainer.bundle import ADAPTER_WEIGHTS, Bundle, open_bundle
from server.engine import Adapter, Devices, EngineCommand, Room, build_command, fingerprint_distance
from server.engine_client import EngineClient
from server.engine_slots import FILL_PATH
from server.errors import EngineCallError
from server.gateway.admission import Lane
from server.gateway.metrics import Metrics
from server.gateway.prefetch import Prefetch
from server.gateway.residency import Residency
from server.gateway.upstream import Upstream
from server.gateway.views import Home
from server.supervisor import Identity, Supervisor
from server.table import WorkerEntry

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KEY = "sesame"
LIMIT_S = 240.0
COPIED = b'introvert_gateway_prefetches_total{worker="worker-0"} 1'
ASKERS = 3
"""More than one, so that probes share the engine's steps with others."""


def adapters_of(bundle: Bundle) -> list[Adapter]:
    return [
        Adapter(
            entry.served_name,
            str(bundle.place_of(entry)),
            entry.rank,
            bundle.card(entry).fingerprint,
            bundle.expert(entry),
        )
        for entry in bundle.manifest.served
    ]


def supervise(config: RunConfig, adapters: Sequence[Adapter], log: Path) -> Supervisor:
    def command(room: Room | None, host: str, port: int) -> EngineCommand:
        return build_command(
            base=config.base,
            serving=config.serving,
            devices=Devices(cores=(min(os.sched_getaffinity(0)),)),
            room=room,
            host=host,
            port=port,
            api_key=KEY,
        )

    return Supervisor(
        identity=Identity("worker-0", "127.0.0.1", "cores:0"),
        command_for=command,
        base_name=config.base.served_name,
        adapters=adapters,
        serving=config.serving,
        log_path=log,
        api_key=KEY,
    )


async def until(supervisor: Supervisor, condition: Callable[[WorkerEntry], bool]) -> WorkerEntry:
    deadline = time.monotonic() + LIMIT_S
    while not condition(supervisor.entry):
        assert time.monotonic() < deadline, supervisor.entry
        await asyncio.sleep(0.05)
    return supervisor.entry


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def truncated(adapter: Adapter, directory: Path) -> Adapter:
    shutil.copytree(adapter.path, directory)
    weights = directory / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    return dataclasses.replace(adapter, served_name="expert-0008@truncated", path=str(directory))


async def ask(client: EngineClient, adapter: Adapter, distances: list[float]) -> None:
    """Ask for one expert until cancelled; how far each answer is from what it has to be."""
    while True:
        measured = await client.probe(adapter.served_name, adapter.fingerprint.token_ids)
        distances.append(fingerprint_distance(measured, adapter.fingerprint.logprobs))


async def test_an_engine_under_load_gets_another_set_of_experts(
    world: Any, tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    config = world.config(tmp_path, serving={"slots": 2})
    first, second, third = adapters_of(open_bundle(world.bundle))
    cut = truncated(third, tmp_path / "cut")
    swapped = dataclasses.replace(
        first, served_name="expert-0009@swapped", fingerprint=third.fingerprint
    )
    supervisor = supervise(config, [first, second], tmp_path / "worker-0.log")
    supervisor.start()
    try:
        before = await until(supervisor, lambda entry: entry.state == "ready")
        assert (len(before.experts), before.slots) == (2, 2)
        assert before.url
        await only_those_with_the_key_are_answered(session, before.url, first)

        client, distances = EngineClient(session, before.url, KEY), list[float]()
        askers = [asyncio.create_task(ask(client, first, distances)) for _ in range(ASKERS)]
        supervisor.serve([cut, first, swapped, third])
        served = [first.served_name, third.served_name]
        after = await until(supervisor, lambda entry: entry.experts == served)
        await a_slot_is_filled_ahead(before.url, first, third)
        asked = len(distances)
        await until(
            supervisor,
            lambda _: any(asker.done() for asker in askers) or len(distances) > asked + ASKERS,
        )
        for asker in askers:
            asker.cancel()
        outcomes = await asyncio.gather(*askers, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError}, outcomes
        assert max(distances) < 0.001

        assert (after.pid, after.restarts) == (before.pid, 0)
        assert set(after.refused) == {cut.served_name, swapped.served_name}
        assert f"{ADAPTER_WEIGHTS} has" in after.refused[cut.served_name]
        assert "does not answer as it did" in after.refused[swapped.served_name]
        with pytest.raises(EngineCallError, match="does not exist"):
            await client.generate(second.served_name)
    finally:
        await supervisor.stop()


async def a_slot_is_filled_ahead(url: str, running: Adapter, adapter: Adapter) -> None:
    """The engine does what the gateway asks of it for an expert that waits for a slot."""
    lane = Lane(limit=8, max_queue=8, group_wait_s=60, clock=time.monotonic)
    lane.regroup(1)
    lane.enter(running.served_name)
    assert lane.queue(adapter.served_name, "", 1.0, lambda _: None)
    metrics, upstream = Metrics(), Upstream(GatewayConfig(), engine_key=KEY)
    home = Home("worker-0", url, lane, Residency(2))
    prefetch = Prefetch(upstream, metrics)
    prefetch.consider(home)
    try:
        async with asyncio.timeout(LIMIT_S):
            while COPIED not in metrics.exposition():  # noqa: ASYNC110 - nobody is told of it
                await asyncio.sleep(0.01)
        assert home.residency is not None
        assert adapter.served_name in home.residency
    finally:
        upstream.close()


async def only_those_with_the_key_are_answered(
    session: aiohttp.ClientSession, url: str, adapter: Adapter
) -> None:
    asking = {"model": adapter.served_name, "prompt": "a", "max_tokens": 1}
    loading = {"lora_name": "mine", "lora_path": adapter.path}
    statuses = {}
    for path, body in {
        "/v1/completions": asking,
        "/v1/load_lora_adapter": loading,
        "/v1/unload_lora_adapter": {"lora_name": adapter.served_name},
        "/invocations": asking,
        "/adapters": {"name": "mine", "src": adapter.path},
        "/tokenize": asking,
        FILL_PATH: {"lora_names": [adapter.served_name]},
    }.items():
        async with session.post(url + path, json=body) as response:
            statuses[path] = response.status
    assert set(statuses.values()) == {401}, statuses
    async with session.get(f"{url}/metrics") as response:
        assert response.status == 200
