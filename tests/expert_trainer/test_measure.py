from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import BaseConfig, ExpertsConfig
from expert_trainer.base import Base, load_base
from expert_trainer.lora import Adapter
from expert_trainer.losses import LanguageModel
from expert_trainer.measure import (
    document_losses,
    fingerprint,
    mean_loss,
    probe_ids,
    sample,
    sample_tokens,
)
from expert_trainer.types import Example


@pytest.fixture(scope="module")
def base(base_dir: Path) -> Base:
    return load_base(BaseConfig(model=str(base_dir)))


def make_example(size: int, seed: int) -> Example:
    ids = np.random.default_rng(seed).integers(0, 400, size).tolist()
    return Example(ids, [False] + [True] * (size - 1))


def test_losses_are_the_models_own(base: Base) -> None:
    examples = [make_example(size, size) for size in (9, 30, 4, 17, 32)]
    sums = document_losses(LanguageModel(base.model), examples, length=32, batch_rows=2)
    assert sums[:, 1].tolist() == [8, 29, 3, 16, 31]
    for (nats, tokens), example in zip(sums, examples, strict=True):
        ids = torch.tensor([example.token_ids])
        assert nats / tokens == pytest.approx(base.model(input_ids=ids, labels=ids).loss.item())


def test_a_long_document_is_measured_whole(base: Base) -> None:
    sums = document_losses(LanguageModel(base.model), [make_example(100, 0)], 32, 4)
    assert sums[0, 1] == 99


def test_nothing_has_no_loss(base: Base) -> None:
    assert mean_loss(document_losses(LanguageModel(base.model), [], 32, 4)) is None


def test_a_sample_keeps_whole_documents_within_the_limit() -> None:
    examples = [make_example(11, seed) for seed in range(50)]
    some = sample(examples, 105, seed=1)
    assert len(some) == 10
    assert sample(examples, 105, seed=1) == some != sample(examples, 105, seed=2)
    assert len(sample(examples, 3, seed=1)) == 1
    assert len(sample(examples, 10**9, seed=1)) == 50
    assert sample([], 10, seed=1) == []


def test_a_fingerprint_tells_models_apart(base_dir: Path) -> None:
    base = load_base(BaseConfig(model=str(base_dir)))
    model = LanguageModel(base.model)
    probe = probe_ids(base.tokenizer, 400)
    plain = fingerprint(model, probe)
    assert len(plain.token_ids) == 32
    assert len(plain.logprobs) == 31
    ids = torch.tensor([plain.token_ids])
    own = base.model(input_ids=ids, labels=ids).loss.item()
    assert -np.mean(plain.logprobs) == pytest.approx(own, rel=1e-5)
    adapter = Adapter(base, ExpertsConfig(rank=2), "tiny")
    adapter.reset(0, 0)
    with adapter.using([0]):
        assert fingerprint(model, probe) == plain
        adapter.set_state(0, adapter.state(0) + 0.5)
        changed = fingerprint(model, probe)
    assert changed.token_ids == plain.token_ids
    assert np.abs(np.subtract(changed.logprobs, plain.logprobs)).max() > 0.01


def test_the_trainings_arithmetic_is_near_the_weights_own(base: Base) -> None:
    model = LanguageModel(base.model, torch.bfloat16)
    examples = [make_example(30, seed) for seed in range(4)]
    own = document_losses(model, examples, 32, 2)
    trained = document_losses(model, examples, 32, 2, as_trained=True)
    assert 0 < np.abs(own[:, 0] - trained[:, 0]).max() < 0.02 * own[:, 0].max()


def test_a_sample_by_tokens_never_reads_more() -> None:
    examples = [make_example(size, size) for size in (90, 10, 20, 40, 15)]
    for limit in (0, 9, 10, 50, 100, 1000):
        some = sample_tokens(examples, limit, seed=1)
        assert sum(len(example.token_ids) for example in some) <= limit
        assert some == sample_tokens(examples, limit, seed=1)
    assert len(sample_tokens(examples, 1000, seed=1)) == 5
    assert len(sample_tokens(examples, 10, seed=1)) == 1


def test_the_probe_stays_inside_a_small_vocabulary(base: Base) -> None:
    assert max(probe_ids(base.tokenizer, 50)) == 49
