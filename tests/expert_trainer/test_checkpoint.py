"""Checkpoints: whole or not at all."""

import logging
from pathlib import Path

import pytest
import torch

from configs.manifest import LossPoint
from expert_trainer.checkpoint import CheckpointFile, MemberState, Progress
from expert_trainer.storage import Storage

DIGEST = "d" * 64


def make_state(seed: int) -> MemberState:
    random = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(50, generator=random) for name in ("values", "exp_avg", "best")}
    progress = Progress(
        step=seed,
        tokens=17,
        seconds=0.1 + 0.2,
        loss_curve=[LossPoint(step=1, loss=1 / 3)],
        recent_losses=[2 / 3],
        best_loss=1e-17,
        worse=1,
    )
    return MemberState(progress, tensors)


@pytest.fixture
def file(tmp_path: Path) -> CheckpointFile:
    return CheckpointFile(Storage(tmp_path), DIGEST)


def test_what_is_written_is_read(file: CheckpointFile) -> None:
    assert file.read() == {}
    members = {"a": make_state(1), "ab": make_state(2)}
    assert file.write(members)
    found = file.read()
    assert found.keys() == members.keys()
    for name, state in members.items():
        assert found[name].progress == state.progress
        assert found[name].tensors.keys() == state.tensors.keys()
        for key, value in state.tensors.items():
            assert torch.equal(found[name].tensors[key], value)
    assert file.write({"a": make_state(3)})
    assert file.read().keys() == {"a"}
    file.remove()
    assert file.read() == {}
    file.remove()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "renamed"])
def test_a_damaged_or_foreign_one_is_not_used(
    file: CheckpointFile, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file.write({"a": make_state(1)})
    path = tmp_path / file.name
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    path.write_bytes(
        {"cut": content[:-9], "empty": b"", "text": b"no checkpoint at all"}.get(damage, content)
    )
    if damage == "renamed":
        file = CheckpointFile(file.directory, "e" * 64)
        path.rename(tmp_path / file.name)
    with caplog.at_level(logging.WARNING):
        assert file.read() == {}
    assert "is not used" in caplog.text


def test_one_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    file = CheckpointFile(Storage(tmp_path / "file"), DIGEST)
    assert not file.write({"a": make_state(1)})
    assert "training goes on" in caplog.text
    assert file.read() == {}
