import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.schema import BaseConfig, ExpertsConfig
from expert_trainer.base import Base, load_base
from expert_trainer.errors import BaseModelError
from expert_trainer.lora import Adapter

CONFIG = ExpertsConfig(rank=4, alpha=8)
IDS = torch.tensor([[3, 14, 15, 92, 65]])


def scramble(adapter: Adapter, seed: int, slot: int = 0) -> None:
    """Give a slot values that change what the model says."""
    adapter.reset(slot, seed)
    random = torch.Generator().manual_seed(seed)
    values = adapter.state(slot)
    adapter.set_state(slot, values + 0.3 * torch.randn(values.shape, generator=random))


@pytest.fixture
def base(base_dir: Path) -> Base:
    return load_base(BaseConfig(model=str(base_dir)))


def logits(base: Base, adapter: Adapter | None = None, *slots: int) -> torch.Tensor:
    """What the base says to the same tokens for each slot, or alone."""
    with torch.no_grad():
        if adapter is None:
            return base.model(input_ids=IDS).logits
        with adapter.using(slots):
            return base.model(input_ids=IDS.repeat(max(len(slots), 1), 1)).logits


def test_a_new_adapter_changes_nothing(base: Base) -> None:
    before = logits(base)
    adapter = Adapter(base, CONFIG, "tiny")
    adapter.reset(0, 1)
    torch.testing.assert_close(logits(base, adapter, 0), before, rtol=0, atol=0)
    scramble(adapter, 1)
    assert (logits(base, adapter, 0) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(base, adapter), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(base), before, rtol=0, atol=0)


def test_a_reset_forgets_the_expert_before(base: Base, tmp_path: Path) -> None:
    adapter = Adapter(base, CONFIG, "tiny")
    adapter.reset(0, 7)
    adapter.save(0, tmp_path / "first")
    scramble(adapter, 8)
    adapter.resize(3)
    adapter.reset(2, 7)
    adapter.save(2, tmp_path / "again")
    first, again = (tmp_path / name / "adapter_model.safetensors" for name in ("first", "again"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("slots", [(0,), (0, 1, 2), (1,), (2, 0), (0, 2)])
def test_each_slot_answers_for_its_rows(base: Base, slots: tuple[int, ...]) -> None:
    adapter = Adapter(base, CONFIG, "tiny")
    adapter.resize(3)
    for slot in range(3):
        scramble(adapter, slot, slot)
    together = logits(base, adapter, *slots)
    for row, slot in zip(together, slots, strict=True):
        torch.testing.assert_close(row, logits(base, adapter, slot)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slots", [(0, 1), (1,)])
def test_gradients_are_those_of_peft(
    base: Base, base_dir: Path, tmp_path: Path, slots: tuple[int, ...]
) -> None:
    adapter = Adapter(base, CONFIG, "tiny")
    adapter.resize(2)
    for slot in (0, 1):
        scramble(adapter, slot, slot)
    with adapter.using(slots):
        base.model(input_ids=IDS.repeat(len(slots), 1)).logits.square().sum().backward()
    for slot in slots:
        adapter.save(slot, tmp_path / str(slot))
        fresh = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(fresh, str(tmp_path / str(slot)), is_trainable=True)
        theirs(input_ids=IDS).logits.square().sum().backward()
        expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        gradient = adapter.parameter(slot).grad
        assert gradient is not None
        norm = torch.stack([value.norm() for value in expected.values()]).norm()
        torch.testing.assert_close(gradient.norm(), norm, rtol=1e-4, atol=0)
        values = adapter.state(slot)
        adapter.set_state(slot, gradient)  # saved under PEFT's names, gradients can be compared
        adapter.save(slot, tmp_path / "gradients")
        adapter.set_state(slot, values)
        mine = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(
                mine[name.replace(".default", "")], value, rtol=1e-3, atol=1e-3
            )
    untouched = {0, 1} - set(slots)
    assert all(not adapter.parameter(slot).grad.any() for slot in untouched)  # type: ignore[union-attr]


def test_dropout_follows_from_its_noise_alone(base: Base) -> None:
    adapter = Adapter(base, CONFIG.model_copy(update={"dropout": 0.5}), "tiny")
    adapter.resize(2)
    for slot in (0, 1):
        scramble(adapter, slot, slot)

    def dropped(slots: tuple[int, ...], noise: list[int]) -> torch.Tensor:
        with torch.no_grad(), adapter.using(slots, noise):
            return base.model(input_ids=IDS.repeat(len(slots), 1)).logits

    both = dropped((0, 1), [11, 22])
    torch.testing.assert_close(both[1], dropped((1,), [22])[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(dropped((0,), [11]), dropped((0,), [11]))
    assert (dropped((0,), [11]) - dropped((0,), [12])).abs().max() > 0.1
    assert (dropped((0,), [11]) - logits(base, adapter, 0)).abs().max() > 0.1


def test_dropout_keeps_the_mean(base: Base) -> None:
    adapter = Adapter(base, CONFIG.model_copy(update={"dropout": 0.25}), "tiny")
    scramble(adapter, 3)
    layer = base.model.model.layers[0].self_attn.q_proj
    x = torch.ones(1, 4000, 32)
    with torch.no_grad():
        plain = layer(x)
        with adapter.using([0]):
            whole = layer(x) - plain
        with adapter.using([0], [5]):
            dropped = layer(x) - plain
    spread = (dropped - whole).std(dim=1)
    assert spread.min() > 0
    assert ((dropped - whole).mean(dim=1).abs() < 5 * spread / 4000**0.5).all()


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_what_is_saved(base: Base, base_dir: Path, tmp_path: Path, rslora: bool) -> None:
    adapter = Adapter(base, CONFIG.model_copy(update={"rslora": rslora}), "tiny")
    adapter.resize(2)
    scramble(adapter, 2, slot=1)
    adapter.save(1, tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, logits(base, adapter, 1))


def test_the_saved_config_is_the_same_everywhere(base: Base, tmp_path: Path) -> None:
    adapter = Adapter(base, CONFIG, "tiny")
    adapter.reset(0, 0)
    adapter.save(0, tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert isinstance(config["lora_alpha"], int)
    assert str(base.model.config.name_or_path) not in text
    assert list(tmp_path.iterdir()) != []
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_load_takes_over_saved_values(base: Base, tmp_path: Path) -> None:
    adapter = Adapter(base, CONFIG, "tiny")
    scramble(adapter, 3)
    wanted = logits(base, adapter, 0)
    adapter.save(0, tmp_path)
    adapter.resize(2)
    adapter.load(1, tmp_path)
    torch.testing.assert_close(logits(base, adapter, 1), wanted, rtol=0, atol=0)


def test_an_adapter_of_another_shape_is_refused(base: Base, base_dir: Path, tmp_path: Path) -> None:
    adapter = Adapter(base, CONFIG, "tiny")
    adapter.save(0, tmp_path)
    config = CONFIG.model_copy(update={"target_modules": ["q_proj"]})
    other = Adapter(load_base(BaseConfig(model=str(base_dir))), config, "tiny")
    with pytest.raises(BaseModelError, match=r"another shape.*experts\.target_modules"):
        other.load(0, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 2}, r"experts\.rank=4, but .* says 2;"),
        ({"alpha": 32.0}, r"experts\.alpha=8, but .* says 32\.0;"),
        ({"rslora": True}, r"experts\.rslora=False, but .* says True;"),
    ],
)
def test_an_adapter_of_another_scaling_is_refused(
    base: Base, base_dir: Path, tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    Adapter(base, CONFIG, "tiny").save(0, tmp_path)
    config = CONFIG.model_copy(update=changed)
    other = Adapter(load_base(BaseConfig(model=str(base_dir))), config, "tiny")
    with pytest.raises(BaseModelError, match=message):
        other.load(0, tmp_path)


def test_named_modules(base: Base, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"target_modules": ["q_proj", "v_proj"]})
    adapter = Adapter(base, config, "tiny")
    assert adapter.target_modules == ["q_proj", "v_proj"]
    adapter.save(0, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("modules", "message"),
    [(["nothing_like_it"], "does not fit the base"), (["lm_head"], "output head")],
)
def test_modules_that_cannot_be_served(base: Base, modules: list[str], message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        Adapter(base, CONFIG.model_copy(update={"target_modules": modules}), "tiny")


def test_settle_rounds_to_the_bases_type(base_dir: Path, tmp_path: Path) -> None:
    base = load_base(BaseConfig(model=str(base_dir), dtype="bfloat16"))
    adapter = Adapter(base, CONFIG, "tiny")
    scramble(adapter, 5)
    before = adapter.state(0)
    assert before.dtype == torch.float32
    adapter.settle(0)
    after = adapter.state(0)
    assert torch.equal(after, before.bfloat16().float())
    adapter.save(0, tmp_path)
    adapter.load(0, tmp_path)
    assert torch.equal(adapter.state(0), after)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
