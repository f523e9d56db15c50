from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import load_config
from configs.schema import ServingConfig
from server.errors import TopologyError
from server.topology import Node, plan_workers, replan_workers

nodes = st.lists(st.tuples(st.integers(0, 16), st.integers(0, 8)), min_size=1, max_size=5).map(
    lambda sizes: [
        Node(f"node-{i}", f"10.0.0.{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)
    ]
)
servings = st.builds(
    ServingConfig,
    workers=st.just("auto") | st.integers(1, 8),
    gpus_per_worker=st.just("auto") | st.integers(0, 3),
    cpus_per_worker=st.integers(1, 4),
)


@given(nodes, servings)
def test_a_plan_never_takes_more_than_a_node_has(
    cluster: list[Node], serving: ServingConfig
) -> None:
    try:
        specs = plan_workers(cluster, serving)
    except TopologyError:
        return
    assert [spec.id for spec in specs] == [f"worker-{i}" for i in range(len(specs))]
    for node in cluster:
        here = [spec for spec in specs if spec.node_id == node.id]
        assert sum(spec.cpus for spec in here) <= node.cpus
        assert sum(spec.gpus for spec in here) <= node.gpus
        cores = [core for spec in here for core in spec.cores]
        assert len(set(cores)) == len(cores)
        assert all(core < node.cpus for core in cores)


@given(nodes, servings)
def test_a_refusal_is_right(cluster: list[Node], serving: ServingConfig) -> None:
    gpus = serving.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if any(node.gpus for node in cluster) else 0
    room = sum(
        min(
            node.cpus // serving.cpus_per_worker,
            node.gpus // gpus if gpus else node.cpus,
        )
        for node in cluster
    )
    wanted = room if serving.workers == "auto" else serving.workers
    if 0 < wanted <= room:
        assert len(plan_workers(cluster, serving)) == wanted
    else:
        with pytest.raises(TopologyError, match=f"room for {room}"):
            plan_workers(cluster, serving)


def test_a_cpu_machine_gives_each_worker_cores_of_its_own() -> None:
    specs = plan_workers(
        [Node("n", "127.0.0.1", 4, 0)], ServingConfig(workers=2, cpus_per_worker=2)
    )
    assert [spec.cores for spec in specs] == [(0, 1), (2, 3)]
    assert all(spec.gpus == 0 and spec.address == "127.0.0.1" for spec in specs)


def test_auto_takes_one_gpu_each_and_leaves_nodes_without_any() -> None:
    cluster = [Node("a", "10.0.0.1", 16, 2), Node("b", "10.0.0.2", 16, 0)]
    specs = plan_workers(cluster, ServingConfig())
    assert [(spec.node_id, spec.gpus, spec.cores) for spec in specs] == [("a", 1, ()), ("a", 1, ())]


def test_few_workers_are_spread_over_the_nodes() -> None:
    cluster = [Node(f"n{i}", f"10.0.0.{i}", 32, 8) for i in range(4)]
    specs = plan_workers(cluster, ServingConfig(workers=4))
    assert Counter(spec.node_id for spec in specs) == {f"n{i}": 1 for i in range(4)}


PRESET_CLUSTERS = {
    "demo": ([Node("n", "127.0.0.1", 2, 0)], 2),
    "two_gpu": ([Node("n", "10.0.0.1", 16, 2)], 2),
    "moin_5k": ([Node(f"n{i}", f"10.0.0.{i}", 96, 8) for i in range(8)], 64),
}


@pytest.mark.parametrize("preset", PRESET_CLUSTERS)
def test_presets_fit_the_clusters_they_are_made_for(preset: str) -> None:
    cluster, workers = PRESET_CLUSTERS[preset]
    specs = plan_workers(cluster, load_config(preset).serving)
    assert len(specs) == workers
    on_node = Counter(spec.node_id for spec in specs)
    assert set(on_node.values()) == {workers // len(cluster)}


def test_the_refusal_says_what_is_there_and_what_to_do() -> None:
    with pytest.raises(TopologyError) as refusal:
        plan_workers([Node("n", "127.0.0.1", 2, 0)], ServingConfig(workers=3))
    text = str(refusal.value)
    assert "3 worker(s) of 0 GPU(s) and 1 core(s) each do not fit" in text
    assert "127.0.0.1: 2 cores, 0 GPUs" in text
    assert "lower serving.workers" in text
    assert refusal.value.exit_code == 2


@given(nodes, servings, st.data())
def test_after_nodes_came_and_went_nobody_on_a_living_one_moved(
    cluster: list[Node], serving: ServingConfig, data: st.DataObject
) -> None:
    try:
        before = plan_workers(cluster, serving)
    except TopologyError:
        return
    alive = [node for node in cluster if data.draw(st.booleans())]
    came = [Node("new", "10.0.1.0", 8, cluster[0].gpus)] if data.draw(st.booleans()) else []
    after = replan_workers(before, [*alive, *came], serving)
    kept = [spec for spec in before if spec.node_id in {node.id for node in alive}]
    assert [spec for spec in after if spec in kept] == kept
    assert len({spec.id for spec in after}) == len(after)
    if serving.workers != "auto":
        assert len(after) <= max(serving.workers, len(kept))
    for node in [*alive, *came]:
        here = [spec for spec in after if spec.node_id == node.id]
        assert sum(spec.cpus for spec in here) <= node.cpus
        assert sum(spec.gpus for spec in here) <= node.gpus
        cores = [core for spec in here for core in spec.cores]
        assert len(set(cores)) == len(cores)
    if alive == cluster and not came:
        assert after == before


def test_a_lost_node_s_workers_are_hired_again_where_there_is_room() -> None:
    one, two, three = (Node(f"n{i}", f"10.0.0.{i}", 2, 0) for i in range(3))
    serving = ServingConfig(workers=4)
    before = plan_workers([one, two], serving)
    alone = replan_workers(before, [two], serving)
    assert [(spec.id, spec.node_id) for spec in alone] == [("worker-2", "n1"), ("worker-3", "n1")]
    again = replan_workers(alone, [two, three], serving)
    assert [spec.node_id for spec in again] == ["n2", "n2", "n1", "n1"]
    assert [spec.id for spec in again] == [f"worker-{i}" for i in range(4)]
    assert [spec.cores for spec in again[:2]] == [(0,), (1,)]


def test_auto_takes_what_a_new_node_has() -> None:
    one, two = (Node(f"n{i}", f"10.0.0.{i}", 4, 2) for i in range(2))
    before = plan_workers([one], ServingConfig())
    assert len(before) == 2
    assert len(replan_workers(before, [one, two], ServingConfig())) == 4
