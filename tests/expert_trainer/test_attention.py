"""Attention within documents against torch's own with a mask."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from expert_trainer.attention import DENSE_TOKENS, LAYOUT, NAME, attend, layout_of, use_documents

ROWS = st.lists(
    st.lists(st.integers(1, 70), min_size=1, max_size=5).filter(lambda row: sum(row) <= 128),
    min_size=1,
    max_size=3,
)


def positions(rows: list[list[int]], length: int) -> torch.Tensor:
    """Position ids of rows of documents, the rest of a row a document of its own."""
    filled = [[*row, length - sum(row)] for row in rows]
    return torch.tensor([[i for size in row for i in range(size)] for row in filled])


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor) -> Any:
    documents = (ids == 0).cumsum(-1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    mask = same & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=gqa)


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, heads=st.sampled_from([(2, 2), (4, 2)]), seed=st.integers(0, 99))
def test_it_is_masked_attention_forward_and_backward(
    rows: list[list[int]], heads: tuple[int, int], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    ids = positions(rows, 128)
    inputs = [
        torch.randn(len(rows), count, 128, 8, generator=random).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]
    wanted = torch.tensor([[i < sum(row) for i in range(128)] for row in rows])
    expected = masked(*inputs, ids).transpose(1, 2)[wanted]
    found = attend(torch.nn.Module(), *inputs, **{LAYOUT: layout_of(ids)})[0][wanted]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn(expected.shape, generator=random)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_long_documents_take_the_kernel_that_never_holds_all_scores() -> None:
    size = DENSE_TOKENS + 40
    query, key, value = (torch.randn(1, 2, size, 4) for _ in range(3))
    ids = torch.arange(size)[None]
    found = attend(torch.nn.Module(), query, key, value, **{LAYOUT: layout_of(ids)})[0]
    torch.testing.assert_close(found, masked(query, key, value, ids).transpose(1, 2))


def test_without_a_layout_a_row_is_a_document() -> None:
    query, key, value = (torch.randn(2, 2, 40, 4) for _ in range(3))
    found = attend(torch.nn.Module(), query, key, value)[0]
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_a_model_is_switched_and_computes_the_same(base_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_dir, attn_implementation="sdpa").eval()
    ids = positions([[30, 20], [64]], 64)
    tokens = torch.randint(0, 400, ids.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=tokens, position_ids=ids, use_cache=False).logits
        assert use_documents(model)
        assert model.config._attn_implementation == NAME
        layout = layout_of(ids)
        found = model(
            input_ids=tokens, position_ids=ids, use_cache=False, **{LAYOUT: layout}
        ).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [4, None])
def test_a_model_with_a_sliding_window_keeps_its_masks(window: int | None) -> None:
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=window,
            attn_implementation="sdpa",
        )
    ).eval()
    assert use_documents(model) is (window is None)
    assert model.config._attn_implementation == (NAME if window is None else "sdpa")


def test_what_changes_scores_is_refused() -> None:
    tensors = (torch.zeros(1, 1, 2, 4) for _ in range(3))
    with pytest.raises(NotImplementedError, match="softcap"):
        attend(torch.nn.Module(), *tensors, softcap=math.pi)
