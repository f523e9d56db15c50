"""Steps of learners that share passes of the base."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import BaseConfig, ExpertsConfig
from expert_trainer.base import load_base
from expert_trainer.lora import Adapter
from expert_trainer.losses import LanguageModel
from expert_trainer.optimise import Learner, Step, draw, rate_factor, take_step
from expert_trainer.packing import endless_rows
from expert_trainer.types import Example

CONFIG = ExpertsConfig(rank=4, alpha=8, sequence_length=32, batch_rows=4)


def make_examples(seed: int, count: int = 30) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        Example(random.integers(5, 60, size).tolist(), [False] + [True] * (size - 1))
        for size in random.integers(4, 30, count)
    ]


class Desk:
    """A base with an adapter and one learner for each seed."""

    def __init__(
        self,
        base_dir: Path,
        seeds: Sequence[int] = (3,),
        steps: int = 6,
        training_dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> None:
        self.config = CONFIG.model_copy(update=changes)
        self.base = load_base(BaseConfig(model=str(base_dir)))
        self.adapter = Adapter(self.base, self.config, "tiny")
        self.adapter.resize(len(seeds))
        self.model = LanguageModel(self.base.model, training_dtype)
        self.learners = [self.learner(slot, seed, steps) for slot, seed in enumerate(seeds)]

    def learner(self, slot: int, seed: int, steps: int) -> Learner:
        self.adapter.reset(slot, seed)
        rows = endless_rows(make_examples(1), self.config.sequence_length, seed)
        return Learner(
            self.adapter, slot, rows, self.config, steps=steps, learning_rate=1e-2, seed=seed
        )

    def step(self, *learners: Learner) -> list[Step]:
        some = learners or self.learners
        passes = draw(some, self.config, self.base.device)
        return take_step(self.model, self.adapter, some, passes, self.config)

    def train(self, steps: int = 6) -> list[Step]:
        """Steps of the first learner."""
        return [self.step()[0] for _ in range(steps)]


def train(base_dir: Path, directory: Path, *, steps: int = 6, **changes: Any) -> list[Step]:
    """Train one adapter on a freshly loaded base and save it."""
    desk = Desk(base_dir, steps=steps, **changes)
    taken = desk.train(steps)
    desk.adapter.save(0, directory)
    return taken


def digest(directory: Path) -> str:
    content = (directory / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content + (directory / "adapter_config.json").read_bytes()).hexdigest()


def test_equal_seeds_give_equal_bits_and_others_do_not(base_dir: Path, tmp_path: Path) -> None:
    one = train(base_dir, tmp_path / "one", dropout=0.1)
    two = train(base_dir, tmp_path / "two", dropout=0.1)
    train(base_dir, tmp_path / "three", seeds=(4,), dropout=0.1)
    assert one == two
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert digest(tmp_path / "one") != digest(tmp_path / "three")


def test_a_fresh_process_gives_the_same_bits(base_dir: Path, tmp_path: Path) -> None:
    train(base_dir, tmp_path / "here")
    threads = str(torch.get_num_threads())
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
        "import test_optimise as t; t.train(Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    here = str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, "-c", code, here, str(base_dir), str(tmp_path / "there")],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": threads},
    )
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(base_dir: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    steps = train(base_dir, tmp_path / "a", steps=40, training_dtype=dtype)
    losses = [step.loss for step in steps]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def test_bfloat16_learns_what_float32_learns(base_dir: Path, tmp_path: Path) -> None:
    """The same rows: losses within a hundredth of a nat, the whole way."""
    exact, quick = (
        train(base_dir, tmp_path / str(dtype), steps=30, training_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    apart = [one.loss - two.loss for one, two in zip(exact, quick, strict=True)]
    assert 0 < max(map(abs, apart)) < 0.05
    assert abs(np.mean(apart)) < 0.01


def test_accumulated_passes_weigh_tokens_and_not_passes(base_dir: Path, tmp_path: Path) -> None:
    """Two passes of 2 rows take the same steps as one pass of 4, however uneven the rows."""
    whole = train(base_dir, tmp_path / "whole", batch_rows=4, gradient_accumulation=1)
    parts = train(base_dir, tmp_path / "parts", batch_rows=2, gradient_accumulation=2)
    for one, two in zip(whole, parts, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-4)
        assert one.tokens == two.tokens


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    rows=st.integers(1, 3),
    passes=st.integers(1, 2),
    dropout=st.sampled_from([0.0, 0.3]),
    leaver=st.integers(0, 3),
)
def test_together_as_alone(
    base_dir: Path, seeds: list[int], rows: int, passes: int, dropout: float, leaver: int
) -> None:
    """Whatever the shapes, and after one has left; values up to 0.3 agree to 1e-5."""
    shape = {"batch_rows": rows, "gradient_accumulation": passes, "dropout": dropout}
    desk = Desk(base_dir, seeds, **shape)
    gone = desk.learners[leaver % len(seeds)]
    for step in range(3):
        some = [learner for learner in desk.learners if step < 2 or learner is not gone]
        if some:
            desk.step(*some)
    for slot, seed in enumerate(seeds):
        single = Desk(base_dir, [seed], **shape)
        single.train(2 if desk.learners[slot] is gone else 3)
        torch.testing.assert_close(
            desk.adapter.state(slot), single.adapter.state(0), rtol=0, atol=1e-5
        )


def test_the_base_stays_as_it_is(base_dir: Path) -> None:
    desk = Desk(base_dir)
    before = {name: value.clone() for name, value in desk.base.model.state_dict().items()}
    desk.train(2)
    after = desk.base.model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value)
    assert all(not parameter.requires_grad for n, parameter in frozen(desk) if "lora" not in n)


def frozen(desk: Desk) -> list[tuple[str, torch.nn.Parameter]]:
    return list(desk.base.model.named_parameters())


def test_a_gradient_is_clipped_to_its_own_norm(base_dir: Path) -> None:
    """With a tiny limit every step is that of the limit, and AdamW's first is scale-free."""
    free, tight = (Desk(base_dir, max_grad_norm=limit) for limit in (1e9, 1e-3))
    (one,), (two,) = free.step(), tight.step()
    assert one.gradient_norm == pytest.approx(two.gradient_norm)
    assert tight.learners[0].gradient.norm() == pytest.approx(1e-3, rel=1e-3)
    assert free.learners[0].gradient.norm() == pytest.approx(one.gradient_norm, rel=1e-4)


def test_one_that_is_no_number_takes_no_step(base_dir: Path) -> None:
    desk = Desk(base_dir, (1, 2))
    desk.adapter.set_state(0, torch.full_like(desk.adapter.state(0), float("nan")))
    bad, good = desk.step()
    assert not bad.finite
    assert good.finite
    assert [learner.step for learner in desk.learners] == [0, 1]
    assert desk.adapter.state(1).isfinite().all()


def test_a_learner_goes_on_from_its_state(base_dir: Path) -> None:
    desk = Desk(base_dir, dropout=0.2, gradient_accumulation=2)
    desk.train(3)
    state = {name: value.clone() for name, value in desk.learners[0].state().items()}
    desk.train(3)
    other = Desk(base_dir, dropout=0.2, gradient_accumulation=2)
    other.learners[0].set_state(state, 3)
    other.train(3)
    assert torch.equal(other.adapter.state(0), desk.adapter.state(0))
    fresh = Desk(base_dir)
    begin = fresh.learners[0].state()
    assert begin.keys() == {"values"}
    fresh.learners[0].set_state(begin, 0)
    assert fresh.step()[0] == Desk(base_dir).step()[0]


@given(steps=st.integers(1, 500), warmup=st.floats(0, 1))
def test_the_rate_warms_up_and_falls_to_zero(steps: int, warmup: float) -> None:
    factors = [rate_factor(step, steps, warmup) for step in range(1, steps + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if warmup <= 0.5 and steps >= 20:
        assert factors[-1] < 0.05


def test_rows_beyond_the_steps_are_not_drawn(base_dir: Path) -> None:
    desk = Desk(base_dir)
    (learner,) = desk.learners
    learner.rows = islice(learner.rows, 8)
    assert len(desk.train(2)) == 2
    assert next(learner.rows, None) is None
