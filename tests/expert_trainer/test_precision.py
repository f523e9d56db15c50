"""Norms and rotary positions that stay in autocast's type."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from expert_trainer.precision import keep_low


def make_norm(size: int = 24) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(size)
    torch.manual_seed(1)
    norm.weight.data.normal_()
    norm.requires_grad_(False)
    return norm


class Holder(torch.nn.Module):
    """A model of norms alone."""

    device = torch.device("cpu")

    def __init__(self, *norms: torch.nn.Module) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(norms)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_norm_is_the_models_own_forward_and_backward(kind: torch.dtype) -> None:
    own, quick = make_norm(), make_norm()
    assert keep_low(Holder(quick)) == 1
    x = (5 * torch.randn(2, 7, 24)).to(kind)
    gradient = torch.randn(2, 7, 24)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (norm(each) for norm, each in zip((own, quick), inputs, strict=True))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
    expected.backward(gradient.to(expected.dtype))
    found.backward(gradient.to(found.dtype))
    assert inputs[1].grad is not None
    assert inputs[1].grad.dtype == kind
    torch.testing.assert_close(inputs[1].grad.float(), inputs[0].grad.float(), rtol=2e-2, atol=2e-2)


def test_outside_autocast_a_norm_is_left_alone() -> None:
    own, quick = make_norm(), make_norm()
    keep_low(Holder(quick))
    x = torch.randn(3, 24)
    assert torch.equal(own(x), quick(x))


def test_a_norm_of_another_kind_is_left_alone() -> None:
    """Gemma's adds 1 to the weight."""
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = Gemma2ForCausalLM(config).requires_grad_(False)
    assert keep_low(model) == 0


def test_a_model_stays_low_between_its_layers(base_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_dir).requires_grad_(False).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=ids).logits.float()
    assert keep_low(model) == 5
    seen: list[torch.dtype] = []
    layer = model.model.layers[1].self_attn
    layer.q_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    model.model.rotary_emb.register_forward_hook(lambda _, __, out: seen.append(out[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        after = model(input_ids=ids).logits.float()
    assert set(seen) == {torch.bfloat16}
    assert (after - before).abs().max() < 0.05 * before.abs().max()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    assert (plain - before).abs().max() < 0.05 * before.abs().max()
