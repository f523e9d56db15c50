"""Who is trained with whom, and that a run which goes on keeps to it."""

from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import ExpertsConfig
from expert_trainer.cohort_plan import PLAN_FILE, group
from expert_trainer.expert import TrainJob
from expert_trainer.shards import Shard
from expert_trainer.storage import Storage


@pytest.fixture
def jobs(tmp_path: Path) -> list[TrainJob]:
    """Four jobs, longest first."""
    place = Storage(str(tmp_path))
    shard = Shard(place, "cluster.jsonl", "0" * 64)
    first = TrainJob(
        id="expert-0000",
        shards=(shard,),
        heldout=(),
        heldout_limit=100,
        steps=40,
        learning_rate=1e-3,
        seed=0,
        experts=ExpertsConfig(),
        base_digest="1" * 64,
        tokenizer_digest="2" * 64,
        dtype="auto",
        root=place / "experts",
    )
    return [replace(first, id=f"expert-{n:04d}", seed=n, steps=40 - n) for n in range(4)]


def names(cohorts: list[tuple[TrainJob, ...]]) -> list[list[str]]:
    return [[job.id for job in members] for members in cohorts]


def every(jobs: list[TrainJob]) -> list[str]:
    return [job.id for job in jobs]


def test_a_run_that_goes_on_keeps_its_cohorts(jobs: list[TrainJob], tmp_path: Path) -> None:
    """Though a member has finished and the cluster has another size by now."""
    place = Storage(str(tmp_path / "checkpoints"))
    planned = group(jobs, every(jobs), place=place, actors=2, fused=2)
    assert sorted(map(len, planned)) == [2, 2]
    done = planned[0][0].id
    missing = [name for name in every(jobs) if name != done]
    assert names(group(jobs, missing, place=place, actors=4, fused=1)) == names(planned)
    left = [job.id for job in planned[1]]
    assert names(group(jobs, left, place=place, actors=4, fused=1)) == [left]


def test_another_run_plans_anew(jobs: list[TrainJob], tmp_path: Path) -> None:
    place = Storage(str(tmp_path / "checkpoints"))
    group(jobs, every(jobs), place=place, actors=1, fused=4)
    others = [replace(job, learning_rate=2e-3) for job in jobs]
    assert names(group(others, every(others), place=place, actors=1, fused=1)) == [
        [name] for name in every(others)
    ]


def test_a_plan_that_cannot_be_read_is_made_again(jobs: list[TrainJob], tmp_path: Path) -> None:
    place = Storage(str(tmp_path / "checkpoints"))
    planned = group(jobs, every(jobs), place=place, actors=2, fused=2)
    place.write(PLAN_FILE, b'{"half":')
    assert names(group(jobs, every(jobs), place=place, actors=2, fused=2)) == names(planned)


def test_without_a_place_nothing_is_kept(jobs: list[TrainJob], tmp_path: Path) -> None:
    group(jobs, every(jobs), place=None, actors=2, fused=2)
    assert not list(tmp_path.rglob(PLAN_FILE))
