"""`introvert train` as a user runs it: cards on stdout, exit codes, what goes wrong and resumes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.schema import RunConfig
from expert_trainer.bundle import open_bundle
from tests.expert_trainer.conftest import base_dir, corpus_dir, make_config, write_jsonl

__all__ = ["base_dir", "corpus_dir", "make_config"]

pytestmark = pytest.mark.timeout(900)

COMMAND = str(Path(sys.executable).with_name("introvert"))
ALL = ["expert-0000", "expert-0001", "expert-0002"]

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def config_file(make_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """The tiny run's config, as a file."""
    path = tmp_path / "run.yaml"
    config = make_config(tokens_per_expert=2000).model_dump(mode="json")
    path.write_text(yaml.safe_dump(config))
    return path


def introvert(*arguments: str, **environment: str) -> Done:
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **environment},
    )


def cards(done: Done) -> dict[str, dict[str, Any]]:
    """The cards on stdout, which holds nothing else."""
    return {row["id"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_experts_are_made_made_again_and_taken_back(
    config_file: Path, tmp_path: Path, left_behind: Callable[[], list[str]]
) -> None:
    run, report = str(config_file), tmp_path / "report.json"
    done = introvert("train", run, "--report", str(report))
    assert done.returncode == 0, done.stderr
    assert sorted(cards(done)) == ALL
    summary = json.loads(report.read_text())
    assert summary["admitted"] == ALL
    assert 0 < summary["computing_seconds"] <= summary["actor_seconds"]
    for card in cards(done).values():
        for provenance in ("shards", "heldout_shards", "loss_curve", "heldout_curve", "config"):
            assert card[provenance], provenance
        assert len(card["fingerprint"]["logprobs"]) == len(card["fingerprint"]["token_ids"]) - 1
        assert len({card["tokenizer_digest"], card["base_digest"]}) == 2
    assert list((tmp_path / "bundle.work" / "tensorboard").rglob("events.*"))

    again = introvert("train", run, "--only", "expert-0002", "--set", "experts.learning_rate=0.02")
    assert again.returncode == 0, again.stderr
    assert sorted(cards(again)) == ["expert-0002"]

    assert introvert("experts", "withdraw", run, "expert-0001").returncode == 0
    served = [entry.id for entry in open_bundle(tmp_path / "bundle").manifest.served]
    assert served == ["expert-0000", "expert-0002"]
    assert left_behind() == []


def test_a_loss_that_is_no_number_ends_with_its_cause(config_file: Path) -> None:
    wild = ("--set", "experts.learning_rate=1e30", "--set", "experts.max_grad_norm=1e30")
    done = introvert("train", str(config_file), *wild)
    assert done.returncode == 1
    assert "lower experts.learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_rows_are_named_and_too_many_stop_the_run(config_file: Path, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "A fine row."}, {"words": "none"}])
    done = introvert("train", str(config_file), "--set", f"data.train=[{bad}]")
    assert done.returncode == 1
    assert f"{bad}:2" in done.stderr
    assert "data.max_bad_share" in done.stderr
    assert done.stdout == ""


@contextmanager
def small_disk(directory: Path, kilobytes: int) -> Iterator[None]:
    """A file system of its own in `directory`, soon full."""
    directory.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_is_named_and_with_room_the_same_command_goes_on(
    config_file: Path, tmp_path: Path
) -> None:
    run, disk = str(config_file), tmp_path / "disk"
    place = ("--set", f"bundle.work_dir={disk}/work", "--set", f"bundle.scratch_dir={tmp_path}/s")
    with small_disk(disk, 900):
        filler = disk / "filler"
        fitted = introvert("fit", run, *place)
        assert fitted.returncode == 0, fitted.stderr
        # leave room for one adapter and a half
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(b"x" * (free - 60_000))
        full = introvert("train", run, *place)
        assert full.returncode == 1, full.stderr
        assert "no space left" in full.stderr
        assert "Traceback" not in full.stderr
        made = sorted(cards(full))
        filler.unlink()
        done = introvert("train", run, *place)
        assert done.returncode == 0, done.stderr
        assert sorted([*made, *cards(done)]) == ALL, "what was finished stands"


def test_on_a_cluster_that_loses_a_node_and_gains_one(config_file: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    more = ("--set", "experts.tokens_per_expert=30000", "--set", "experts.fused=1")
    auto = ("--set", "experts.actors=auto", "--set", "experts.checkpoint_s=0.05")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        doomed = cluster.add_node(num_cpus=1)
        with subprocess.Popen(
            [COMMAND, "train", str(config_file), *more, *auto],
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "log").open("w"),
            text=True,
            env={**os.environ, "RAY_ADDRESS": cluster.address},
        ) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]  # one expert is done, two are under way
            cluster.remove_node(doomed, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            lines += process.stdout.readlines()
        log = (tmp_path / "log").read_text()
        assert process.returncode == 0, log
        assert sorted(json.loads(line)["id"] for line in lines) == ALL
    finally:
        cluster.shutdown()
