"""Every shipped preset is loaded and planned: a training schedule and a placement come out."""

import pytest

from configs import load_config
from configs.loading import PRESETS
from configs.manifest import expert_id
from expert_trainer.crew import Node as TrainerNode
from expert_trainer.schedule import plan_training
from server.placement import ExpertDemand, WorkerCapacity, plan_placement
from server.topology import Node, plan_workers

CLUSTERS = {"demo": (1, 2, 0), "two_gpu": (1, 16, 2), "moin_5k": (8, 96, 8)}
"""Nodes, cores of each and GPUs of each that a preset is meant for."""


def test_every_preset_has_a_cluster_here() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(CLUSTERS)


@pytest.mark.parametrize("name", sorted(CLUSTERS))
def test_preset_plans(name: str) -> None:
    config = load_config(name)
    nodes, cpus, gpus = CLUSTERS[name]
    clusters = config.router.clusters
    tokens = [10_000 + 997 * (i * 7919 % 1000) for i in range(clusters)]

    machines = [TrainerNode(f"n{i}", f"h{i}", f"h{i}:1", cpus, gpus) for i in range(nodes)]
    training = plan_training(tokens, config, machines)
    assert sorted(job.cluster for job in training.jobs) == list(range(clusters))
    assert all(job.steps >= 1 for job in training.jobs)

    workers = plan_workers(
        [Node(id=f"n{i}", address=f"node-{i}", cpus=cpus, gpus=gpus) for i in range(nodes)],
        config.serving,
    )
    placement = plan_placement(
        [
            ExpertDemand(id=expert_id(i), mass=n / sum(tokens), rank=config.experts.rank)
            for i, n in enumerate(tokens)
        ],
        [WorkerCapacity(id=worker.id, slots=-(-clusters // len(workers))) for worker in workers],
    )
    assert set(placement.homes) == {expert_id(i) for i in range(clusters)}
    assert all(placement.homes.values())


def test_presets_put_one_actor_and_one_worker_on_each_gpu() -> None:
    for name, (nodes, _, gpus) in CLUSTERS.items():
        config = load_config(name)
        if gpus:
            assert config.experts.actors == config.serving.workers == nodes * gpus
