"""The control plane on real engines and a real Ray: ready, hurt, healed, gone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.cluster import Cluster
from server.engine import fingerprint_distance
from server.gateway_reports import SocketError, ask
from server.table import CONTROL_SOCKET, RoutingTable, WorkerEntry
from tests.end_to_end.load import ANSWER_TOKENS, PROMPT, Load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

# They end hangs, and say nothing of speed: a machine may be slow.
HEAL_S = 240.0
ACTOR_HEAL_S = 480.0
"""Ray has to start the actor before the engine can be."""
NOTICED_S = 60.0
READY_S = 480.0
Introvert = Callable[..., subprocess.CompletedProcess[str]]


def until(
    cluster: Cluster, condition: Callable[[RoutingTable], bool], seconds: float
) -> RoutingTable:
    deadline = time.monotonic() + seconds
    while not condition(cluster.table):
        assert time.monotonic() < deadline, cluster.table.workers
        time.sleep(0.05)
    return cluster.table


def worker(table: RoutingTable, name: str) -> WorkerEntry:
    return next(entry for entry in table.workers if entry.id == name)


HEADERS = {"content-type": "application/json"}
"""For engines; with the key of the cluster under test."""


def complete(entry: WorkerEntry, model: str, prompt: list[int], **extra: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, **extra}
    request = urllib.request.Request(
        f"{entry.url}/v1/completions",
        json.dumps(body).encode(),
        HEADERS,
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def heal(
    cluster: Cluster,
    name: str,
    hurt: Callable[[WorkerEntry], object],
    limit_s: float = HEAL_S,
) -> None:
    """Hurt a worker and see it ready again in time, the other one answering all the while."""
    before = worker(at_rest(cluster), name)
    other = next(entry for entry in cluster.table.workers if entry.id != name)
    began = time.monotonic()
    hurt(before)
    until(cluster, lambda table: worker(table, name).state == "down", NOTICED_S)
    for expert in before.experts:
        until(cluster, lambda table, e=expert: bool(table.ready_workers(e)), HEAL_S)  # type: ignore[misc]
    sheltered = time.monotonic() - began
    while worker(cluster.table, name).state != "ready":
        assert time.monotonic() - began < limit_s, worker(cluster.table, name)
        answer = complete(other, other.experts[0], [40, 41, 42], max_tokens=64)
        assert answer["model"] == other.experts[0]
    seconds = time.monotonic() - began
    after = worker(at_rest(cluster), name)
    assert set(after.experts) == set(before.experts)
    assert complete(after, after.experts[0], [40, 41, 42])["usage"]["completion_tokens"] == 4
    print(f"\n{name}: experts sheltered in {sheltered:.1f} s, healed in {seconds:.1f} s")


def at_rest(cluster: Cluster) -> RoutingTable:
    """The table once every expert is at home, and nowhere else."""

    def settled(table: RoutingTable) -> bool:
        return all(len(home.workers) == 1 for home in table.experts) and all(
            entry.state == "ready" and set(entry.experts) == set(served_by(table, entry.id))
            for entry in table.workers
        )

    return until(cluster, settled, HEAL_S)


def fullest(table: RoutingTable) -> str:
    """The worker that is home to two experts."""
    homes = [home.workers[0] for home in table.experts]
    return max(set(homes), key=homes.count)


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def served_by(table: RoutingTable, name: str) -> list[str]:
    return [home.served_name for home in table.experts if name in home.workers]


@pytest.fixture(scope="module")
def cluster(
    world: Any, left_behind: Callable[[], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    work = tmp_path_factory.mktemp("work")
    with Cluster(world.config(work)) as cluster:
        began = time.monotonic()
        HEADERS["authorization"] = f"Bearer {cluster.engine_key}"
        cluster.wait_ready(READY_S)
        print(f"\ntwo workers ready in {time.monotonic() - began:.1f} s")
        yield cluster
        assert len(left_behind()) > 8, "the check below can fail"
    assert left_behind() == []
    assert not list(work.glob("serving-*"))
    assert sorted(path.name for path in (work / "logs").iterdir()) == [
        "batches.log",
        "control.log",
        "gateway.log",
        "ray.log",
        "worker-0.log",
        "worker-1.log",
    ]


def test_all_experts_are_verified_and_answer(cluster: Cluster, world: Any) -> None:
    table = cluster.table
    assert len(table.experts) == 3
    assert table.max_model_len == 256
    assert all(entry.engine == "vllm 0.32.0" for entry in table.workers)
    assert len({entry.devices for entry in table.workers}) == min(2, len(os.sched_getaffinity(0)))
    for home in table.experts:
        (entry,) = table.ready_workers(home.served_name)
        assert home.workers == [entry.id]
        answer = complete(entry, home.served_name, [40, 41, 42])
        assert (answer["model"], answer["usage"]["completion_tokens"]) == (home.served_name, 4)
    for entry in table.workers:
        assert complete(entry, table.base_name, [40, 41])["model"] == table.base_name
        assert entry.pid
        tree = [psutil.Process(entry.pid), *psutil.Process(entry.pid).children(recursive=True)]
        memory = sum(process.memory_full_info().pss for process in tree)
        print(f"\n{entry.id}: {len(tree)} processes, {memory / 2**30:.2f} GiB")


def test_fingerprints_tell_the_right_expert_from_the_others(cluster: Cluster, world: Any) -> None:
    from expert_trainer.bundle import open_bundle

    bundle = open_bundle(world.bundle)
    recorded = {e.served_name: bundle.card(e).fingerprint for e in bundle.manifest.served}
    for home in cluster.table.experts:
        (entry,) = cluster.table.ready_workers(home.served_name)
        fingerprint = recorded[home.served_name]
        answer = complete(entry, home.served_name, fingerprint.token_ids, prompt_logprobs=0)
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        measured = [next(iter(row.values()))["logprob"] for row in rows]
        right = fingerprint_distance(measured, fingerprint.logprobs)
        wrong = min(
            fingerprint_distance(measured, other.logprobs)
            for name, other in recorded.items()
            if name != home.served_name
        )
        print(f"\n{home.served_name}: right {right:.2e} nats, nearest wrong {wrong:.3f} nats")
        assert right < 0.001
        assert wrong > 0.05


def test_a_killed_api_server_heals_under_a_controller_that_was_killed_before(
    cluster: Cluster,
) -> None:
    def kill(entry: WorkerEntry) -> None:
        assert entry.pid
        os.kill(entry.pid, signal.SIGKILL)

    before = cluster.table
    mine = psutil.Process().children(recursive=True)
    next(process for process in mine if "ray::Controller" in " ".join(cmdline(process))).kill()
    heal(cluster, "worker-0", kill)
    after = cluster.table
    assert after.version > before.version
    assert worker(after, "worker-0").restarts == 1
    assert worker(after, "worker-1").pid == worker(before, "worker-1").pid


def test_a_killed_engine_core_heals_but_for_an_adapter_swapped_meanwhile(
    cluster: Cluster, world: Any
) -> None:
    from expert_trainer.bundle import ADAPTER_WEIGHTS, open_bundle

    bundle = open_bundle(world.bundle)
    name = fullest(at_rest(cluster))
    before = worker(cluster.table, name)
    victim, other = (e for e in bundle.manifest.served if e.served_name in before.experts)
    weights = bundle.expert_dir(victim) / ADAPTER_WEIGHTS
    original = weights.read_bytes()
    weights.write_bytes((bundle.expert_dir(other) / ADAPTER_WEIGHTS).read_bytes())
    try:
        children = psutil.Process(before.pid).children(recursive=True)
        max(children, key=lambda child: child.memory_info().rss).kill()
        until(cluster, lambda table: worker(table, name).state == "down", NOTICED_S)
        table = until(cluster, lambda table: worker(table, name).state == "ready", HEAL_S)
    finally:
        weights.write_bytes(original)
    after = worker(table, name)
    assert after.experts == [other.served_name]
    assert f"{victim.served_name} refused" in after.detail
    # the other worker may hold it still from the test before, as it was then
    assert name not in {entry.id for entry in table.ready_workers(victim.served_name)}


def test_a_killed_worker_actor_takes_its_engine_along_and_heals(cluster: Cluster) -> None:
    def kill(entry: WorkerEntry) -> None:
        assert entry.pid
        ancestry = psutil.Process(entry.pid).parents()
        next(parent for parent in ancestry if "ray::Worker" in " ".join(parent.cmdline())).kill()

    name = fullest(cluster.table)
    engine = worker(cluster.table, name).pid
    assert engine
    kill(worker(cluster.table, name))
    until(cluster, lambda table: worker(table, name).state != "ready", NOTICED_S)
    until(cluster, lambda table: worker(table, name).state == "ready", ACTOR_HEAL_S)
    assert len(worker(at_rest(cluster), name).experts) == 2, "it gets back what it had refused"
    assert not psutil.pid_exists(engine)


def test_a_killed_control_process_is_followed_by_another_and_no_request_notices(
    cluster: Cluster,
) -> None:
    before = cluster.table
    control = cluster._control
    assert control
    pid = control.pid
    assert pid
    with Load(cluster) as load:
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        load.wait_for(30)
        deadline = time.monotonic() + ACTOR_HEAL_S
        while control.pid in (None, pid) or not _follows(cluster):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        print(f"\nanother control process after {time.monotonic() - began:.1f} s")
        load.wait_for(30)
    assert load.failures == []
    assert [entry.pid for entry in cluster.table.workers] == [e.pid for e in before.workers]
    assert cluster.table.version >= before.version


def test_a_bundle_with_a_truncated_adapter_is_refused_by_name(
    cluster: Cluster, next_bundle: Path, introvert: Introvert
) -> None:
    from expert_trainer.bundle import ADAPTER_WEIGHTS, open_bundle

    damaged = next_bundle.with_name("bundle-damaged")
    shutil.copytree(next_bundle, damaged)
    bundle = open_bundle(damaged)
    victim = bundle.manifest.served[1]
    with (damaged / victim.directory / ADAPTER_WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    before = cluster.table
    outcome = introvert("publish", damaged, "--url", cluster.url)
    assert outcome.returncode == 1, outcome.stderr
    assert victim.served_name in outcome.stdout
    assert cluster.table.bundle == before.bundle
    assert cluster.table.canary is None
    until(cluster, lambda table: held(table) == named(before), HEAL_S)


def test_a_bundle_is_changed_under_load_and_every_answer_is_what_it_claims(
    cluster: Cluster, next_bundle: Path, introvert: Introvert
) -> None:
    before = cluster.table
    known = references(before)
    with Load(cluster) as load:
        load.wait_for(30)
        began = time.monotonic()
        outcome = introvert("publish", next_bundle, "--url", cluster.url)
        print(f"\npublished in {time.monotonic() - began:.1f} s\n{outcome.stderr}")
        assert outcome.returncode == 0, outcome.stderr
        load.wait_for(30)
    after = cluster.table
    known |= references(after)
    assert after.bundle != before.bundle
    assert load.failures == []
    assert {name for name, _, _ in load.answers} == set(known), "of both bundles"
    for name, version, text in load.answers:
        assert name.partition("@")[2] == version
        assert text == known[name]
    until(cluster, lambda table: held(table) == named(after), HEAL_S)


def references(table: RoutingTable) -> dict[str, str]:
    """What each expert of a table answers, asked where it lives."""
    return {
        home.served_name: str(
            complete(
                table.ready_workers(home.served_name)[0],
                home.served_name,
                PROMPT,
                max_tokens=ANSWER_TOKENS,
            )["choices"][0]["text"]
        )
        for home in table.experts
    }


def held(table: RoutingTable) -> set[str]:
    return {name for entry in table.workers for name in entry.experts}


def named(table: RoutingTable) -> set[str]:
    return {home.served_name for home in table.experts}


def _follows(cluster: Cluster) -> bool:
    """Whether a control process answers."""
    path = cluster.run_dir / CONTROL_SOCKET
    try:
        return asyncio.run(ask(path, "GET", "/bundle"))[0] == 200
    except SocketError:
        return False


def test_a_killed_gateway_is_back_on_its_port(cluster: Cluster) -> None:
    def healthy() -> bool:
        try:
            return bool(urllib.request.urlopen(f"{cluster.url}/health", timeout=30).status == 200)
        except OSError:
            return False

    assert healthy()
    gateway = next(
        child for child in psutil.Process().children() if "server.gateway" in child.cmdline()
    )
    gateway.kill()
    gateway.wait(60)
    deadline = time.monotonic() + 120
    while not healthy():
        assert time.monotonic() < deadline
        time.sleep(0.1)
