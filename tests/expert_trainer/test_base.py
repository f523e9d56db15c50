import shutil
from pathlib import Path

import pytest
import torch

from configs.schema import BaseConfig
from expert_trainer.base import base_digest, load_base, load_tokenizer, tokenizer_digest
from expert_trainer.errors import BaseModelError


@pytest.fixture
def copy(base_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_dir, tmp_path / "base"))


def test_the_base_is_frozen(base_dir: Path) -> None:
    base = load_base(BaseConfig(model=str(base_dir)))
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    if base.device.type == "cpu":
        assert base.dtype == torch.float32


def test_dtype_is_a_choice(base_dir: Path) -> None:
    assert (
        load_base(BaseConfig(model=str(base_dir), dtype="bfloat16")).model.dtype == torch.bfloat16
    )


def test_the_digest_follows_weights_and_config_alone(copy: Path) -> None:
    config = BaseConfig(model=str(copy))
    digest, tokenizer = base_digest(config), tokenizer_digest(config)
    (copy / "README.md").write_text("words")
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    assert base_digest(config) == digest
    assert tokenizer_digest(config) != tokenizer
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert base_digest(config) != digest


def test_a_directory_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json is missing"):
        load_base(BaseConfig(model=str(tmp_path)))


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="neither a directory here nor a model"):
        load_tokenizer(BaseConfig(model="nobody/nothing-at-all"))


def test_weights_that_are_not_safetensors(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="safetensors"):
        base_digest(BaseConfig(model=str(copy)))
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base(BaseConfig(model=str(copy)))


def test_a_model_without_a_tokenizer(copy: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_tokenizer(BaseConfig(model=str(copy)))
