from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import BaseConfig
from expert_trainer.base import load_base
from expert_trainer.losses import LanguageModel
from expert_trainer.packing import IGNORED, collate, endless_rows, pack, split
from expert_trainer.types import Example

examples = st.lists(
    st.integers(2, 100).map(
        lambda size: Example(list(range(1, size + 1)), [False] + [True] * (size - 1))
    ),
    min_size=1,
    max_size=20,
)


@given(examples=examples, length=st.integers(8, 40))
@settings(deadline=None)
def test_every_target_is_predicted_once_and_no_row_overflows(
    examples: list[Example], length: int
) -> None:
    pieces = [piece for i, example in enumerate(examples) for piece in split(i, example, length)]
    rows = pack(pieces, length)
    assert sum(len(row) for row in rows) == len(pieces)
    assert all(sum(len(piece.token_ids) for piece in row) <= length for row in rows)
    batch = collate(rows, length, "cpu")
    predicted = sorted(
        (owner, label)
        for owner, label in zip(
            batch.owners.flatten().tolist(), batch.labels.flatten().tolist(), strict=True
        )
        if owner != IGNORED
    )
    wanted = sorted(
        (owner, token)
        for owner, example in enumerate(examples)
        for token, target in zip(example.token_ids, example.targets, strict=True)
        if target
    )
    assert predicted == wanted
    assert batch.targets == len(wanted)


def test_prompts_are_context_and_not_targets() -> None:
    example = Example([10, 11, 12, 13], [False, False, True, True])
    batch = collate(pack(split(0, example, 8), 8), 8, "cpu")
    assert batch.labels[batch.owners != IGNORED].tolist() == [12, 13]
    assert batch.tokens == 4


def test_a_stretch_without_targets_is_left_out() -> None:
    example = Example(list(range(20)), [False] * 15 + [True] * 5)
    pieces = split(0, example, 8)
    assert sum(int(piece.targets.sum()) for piece in pieces) == 5
    assert len(pieces) == 1


def test_rows_are_nearly_full() -> None:
    sizes = np.random.default_rng(0).integers(10, 200, 500)
    pieces = [
        piece
        for size in sizes
        for piece in split(0, Example([1] * size, [False] + [True] * (size - 1)), 256)
    ]
    rows = pack(pieces, 256)
    assert sizes.sum() / (len(rows) * 256) > 0.98


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_each_pass_takes_every_document_once(seed: int) -> None:
    some = [Example([i] * (3 + i), [False] + [True] * (2 + i)) for i in range(7)]
    tokens = sum(len(example.token_ids) for example in some)
    rows = list(islice(endless_rows(some, 16, seed), 500))
    counts = np.bincount([piece.owner for row in rows for piece in row], minlength=7)
    passes = sum(len(piece.token_ids) for row in rows for piece in row) / tokens
    pool_passes = 64 * 16 / tokens + 1
    assert np.abs(counts - passes).max() <= pool_passes
    again = list(islice(endless_rows(some, 16, seed), 500))
    assert [[p.owner for p in row] for row in rows] == [[p.owner for p in row] for row in again]


def test_an_epoch_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="anything to predict"):
        next(endless_rows([Example([1, 2], [False, False])], 8, 0))


@pytest.fixture(scope="module")
def model(base_dir: Path) -> LanguageModel:
    return LanguageModel(load_base(BaseConfig(model=str(base_dir))).model)


def test_a_document_has_the_same_loss_packed_and_alone(model: LanguageModel) -> None:
    random = np.random.default_rng(3)
    docs = [
        Example(random.integers(0, 400, size).tolist(), [False] + [True] * (size - 1))
        for size in (5, 60, 17, 30, 2, 41, 23)
    ]
    pieces = [piece for i, doc in enumerate(docs) for piece in split(i, doc, 64)]
    batch = collate(pack(pieces, 64), 64, "cpu")
    assert len(batch.input_ids) < len(docs), "several documents share a row"
    losses = model.token_losses(batch)
    owners = batch.owners[batch.owners != IGNORED]
    for index, doc in enumerate(docs):
        ids = torch.tensor([doc.token_ids])
        alone = model.model(input_ids=ids, labels=ids).loss
        packed = losses[owners == index].mean()
        assert packed.item() == pytest.approx(alone.item(), abs=2e-5)


def test_the_mask_matters(model: LanguageModel) -> None:
    """Without position ids that restart, the second document would see the first."""
    first, second = list(range(10, 40)), list(range(100, 130))
    ids = torch.tensor([first + second])
    labels = torch.tensor([[-100] * 30 + second])
    seen = model.model(input_ids=ids, labels=labels).loss
    alone = model.model(input_ids=torch.tensor([second]), labels=torch.tensor([second])).loss
    assert abs(seen.item() - alone.item()) > 1e-3


def test_total_loss_and_its_gradient_match_the_models_own(model: LanguageModel) -> None:
    random = np.random.default_rng(4)
    docs = [Example(random.integers(0, 400, 64).tolist(), [False] + [True] * 63) for _ in range(3)]
    rows = pack([piece for i, doc in enumerate(docs) for piece in split(i, doc, 64)], 64)
    batch = collate(rows, 64, "cpu")
    weight = model.model.model.layers[0].self_attn.q_proj.weight
    weight.requires_grad_(True)
    model.total_loss(batch, [1.0])[0].backward()
    mine, weight.grad = weight.grad, None
    own = model.model(input_ids=batch.input_ids, labels=batch.input_ids)
    (own.loss * batch.targets).backward()
    theirs, weight.grad = weight.grad, None
    weight.requires_grad_(False)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert model.token_losses(batch).sum().item() == pytest.approx(
        own.loss.item() * batch.targets, rel=1e-5
    )
