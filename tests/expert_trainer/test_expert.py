"""What lets the same job find its expert again, and another job not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.manifest import Fingerprint
from configs.schema import ExpertsConfig
from expert_trainer.expert import (
    RESULT_FILE,
    InitialAdapter,
    Result,
    TrainJob,
    adapter_files,
    seed_of,
)
from expert_trainer.shards import Shard
from expert_trainer.storage import Storage


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(
        id="expert-0001",
        shards=(Shard(Storage(tmp_path), "a.jsonl", "a" * 64),),
        heldout=(Shard(Storage(tmp_path), "h.jsonl", "d" * 64),),
        heldout_limit=100,
        steps=5,
        learning_rate=1e-3,
        seed=1,
        experts=ExpertsConfig(),
        base_digest="b" * 64,
        tokenizer_digest="c" * 64,
        dtype="float32",
        root=Storage(tmp_path / "experts"),
    )


def write_finished(job: TrainJob) -> Result:
    job.root.write(f"{job.id}/adapter_config.json", b"{}")
    job.root.write(f"{job.id}/adapter_model.safetensors", b"weights")
    result = Result(
        digest=job.digest,
        files=adapter_files(job.root / job.id),
        base_digest=job.base_digest,
        tokenizer_digest=job.tokenizer_digest,
        shards=[shard.sha256 for shard in job.shards],
        heldout_shards=[],
        config={},
        init="scratch",
        documents=1,
        tokens=10,
        tokens_seen=10,
        steps=5,
        best_step=5,
        stopped_early=False,
        seed=1,
        rank=8,
        alpha=16,
        rslora=False,
        target_modules=["q_proj"],
        learning_rate=1e-3,
        loss_curve=[],
        heldout_curve=[],
        heldout_documents=0,
        heldout_tokens=0,
        heldout_loss_base=None,
        heldout_loss_expert=None,
        fingerprint=Fingerprint(token_ids=[1, 2], logprobs=[-1.0]),
        seconds=1.0,
        device="cpu",
        created="2026-01-01T00:00:00+00:00",
        code_version="0",
    )
    job.root.write(f"{job.id}/{RESULT_FILE}", result.model_dump_json().encode())
    return result


def test_a_finished_expert_is_found_again(job: TrainJob) -> None:
    assert job.finished() is None
    result = write_finished(job)
    assert job.finished() == result


def test_another_job_does_not_find_it(job: TrainJob) -> None:
    write_finished(job)
    assert replace(job, seed=2).finished() is None


@pytest.mark.parametrize("damage", ["changed", "missing", "no result", "half a result"])
def test_a_damaged_one_is_not_finished(job: TrainJob, tmp_path: Path, damage: str) -> None:
    write_finished(job)
    directory = tmp_path / "experts" / job.id
    if damage == "changed":
        (directory / "adapter_model.safetensors").write_bytes(b"weightz")
    elif damage == "missing":
        (directory / "adapter_config.json").unlink()
    elif damage == "no result":
        (directory / RESULT_FILE).unlink()
    else:
        (directory / RESULT_FILE).write_bytes((directory / RESULT_FILE).read_bytes()[:50])
    assert job.finished() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 6},
        {"learning_rate": 2e-3},
        {"seed": 2},
        {"heldout_limit": 99},
        {"base_digest": "e" * 64},
        {"tokenizer_digest": "e" * 64},
        {"dtype": "bfloat16"},
        {"heldout": ()},
        {"init": InitialAdapter(Storage("somewhere"), "shared", "f" * 64)},
        {"experts": ExpertsConfig(rank=4)},
        {"experts": ExpertsConfig(patience=5)},
        {"experts": ExpertsConfig(precision="float32")},
    ],
    ids=lambda changes: json.dumps(sorted(changes)),
)
def test_what_the_adapter_depends_on_changes_the_digest(
    job: TrainJob, changes: dict[str, Any]
) -> None:
    assert replace(job, **changes).digest != job.digest


@pytest.mark.parametrize(
    "experts",
    [
        ExpertsConfig(fused=4),
        ExpertsConfig(checkpoint_s=1),
        ExpertsConfig(actors=3),
        ExpertsConfig(max_retries=0),
        ExpertsConfig(epochs=2),
        ExpertsConfig(init="shared"),
    ],
)
def test_what_it_does_not_depend_on_does_not(job: TrainJob, experts: ExpertsConfig) -> None:
    assert replace(job, experts=experts).digest == job.digest
    assert replace(job, root=Storage("elsewhere"), id="expert-0002").digest == job.digest


def test_a_seed_is_the_experts_own() -> None:
    seeds = {seed_of(run, name) for run in (0, 1) for name in ("a", "b")}
    assert len(seeds) == 4
    assert seed_of(0, "a") == seed_of(0, "a")
