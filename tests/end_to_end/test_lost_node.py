"""A node of a Ray cluster that is lost under load, with its worker and its engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.cluster import Cluster
from server.table import RoutingTable
from tests.end_to_end.load import Load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

READY_S = 480.0
SETTLED_S = 240.0


@pytest.fixture
def two_nodes(
    left_behind: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A Ray cluster whose head has no room and whose two other nodes have room for a worker."""
    from ray.cluster_utils import Cluster as RayCluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # as in deploy/ray-cluster.yaml
    room = {"object_store_memory": 100 * 2**20}
    ray = RayCluster(initialize_head=True, head_node_args={**room, "num_cpus": 0})
    try:
        for _ in range(2):
            ray.add_node(num_cpus=1, **room)
        monkeypatch.setenv("RAY_ADDRESS", ray.address)
        yield
    finally:
        ray.shutdown()
    deadline = time.monotonic() + 120
    while left := left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_no_request_notices_a_node_that_is_lost(
    two_nodes: None, world: Any, tmp_path: Path
) -> None:
    config = world.config(tmp_path, gateway={"queue_timeout_s": SETTLED_S})
    with Cluster(config) as cluster:
        before = cluster.wait_ready(READY_S)
        homes = [home.workers[0] for home in before.experts]
        victim = next(w for w in before.workers if homes.count(w.id) == 2)
        engine = psutil.Process(victim.pid)
        raylet = next(process for process in engine.parents() if process.name() == "raylet")
        with Load(cluster) as load:
            load.wait_for(30)
            killed = time.monotonic()
            for process in (raylet, *raylet.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()

            def settled(table: RoutingTable) -> bool:
                there = [worker.id for worker in table.workers]
                return victim.id not in there and all(
                    table.ready_workers(home.served_name) for home in table.experts
                )

            while not settled(cluster.table):
                assert time.monotonic() - killed < SETTLED_S, cluster.table.workers
                time.sleep(0.05)
            print(f"\nall experts on the other node after {time.monotonic() - killed:.1f} s")
            load.wait_for(30)
        assert load.failures == []
