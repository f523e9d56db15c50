from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from server.engine_adapters import GroupedAdapters, grouped

SLOTS, RANK, INPUTS, WIDTHS = 4, 3, 8, (5, 2)


@settings(max_examples=50, deadline=None)
@given(slots=st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=20))
def test_each_token_gets_its_own_adapter_and_no_other(slots: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(len(slots), INPUTS)
    y = torch.randn(len(slots), sum(WIDTHS))
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS) for _ in WIDTHS)
    b = tuple(torch.randn(SLOTS, 1, width, RANK) for width in WIDTHS)
    expected = y.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            parts = [b[i][slot, 0] @ (a[i][slot, 0] @ x[token]) for i in range(len(WIDTHS))]
            expected[token] += 2.0 * torch.cat(parts)
    wrapper = GroupedAdapters.__new__(GroupedAdapters)
    wrapper._groups = grouped(torch.tensor(slots))
    wrapper.add_lora_linear(y, x, a, b, 2.0, WIDTHS)
    torch.testing.assert_close(y, expected)


def test_tokens_that_lie_together_are_a_range() -> None:
    assert grouped(torch.tensor([-1, 2, 2, 2, -1])) == ((2, slice(1, 4)),)
    ((slot, places),) = grouped(torch.tensor([1, -1, 1]))
    assert slot == 1
    assert isinstance(places, torch.Tensor)
    assert places.tolist() == [0, 2]
    assert grouped(torch.tensor([-1, -1])) == ()
