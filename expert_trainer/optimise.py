"""Optimiser steps of experts that share passes of the base: AdamW, warm-up and cosine, clipping.

Each has its own rows, its own slot of the adapter, its own optimiser and schedule; only the pass
through the base is shared. Knows nothing of where rows come from, of when training ends or of
where the adapter goes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from configs.schema import ExpertsConfig
from expert_trainer.lora import Adapter
from expert_trainer.losses import LanguageModel
from expert_trainer.packing import Batch, Piece, collate

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each value."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step of one learner."""

    loss: float
    """Mean loss of the step's targets before it was taken, nats per token."""
    gradient_norm: float
    """Before clipping."""
    tokens: int
    """Tokens that it read, padding left out."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers; the step was not taken where they are not."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Learner:
    """One expert in training: a slot of the adapter, its optimiser and its rows."""

    def __init__(
        self,
        adapter: Adapter,
        slot: int,
        rows: Iterator[list[Piece]],
        config: ExpertsConfig,
        *,
        steps: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        """Start from the values that the slot holds.

        Args:
            adapter: holds the slot.
            slot: whose values are trained.
            rows: packed rows, at least as many as the steps take.
            config: weight decay, warm-up, rows of a step.
            steps: optimiser steps until the learning rate is zero.
            learning_rate: the peak.
            seed: of the dropout.
        """
        self.slot, self.rows, self.seed = slot, rows, seed
        self.step, self.steps = 0, steps
        self._learning_rate, self._warmup_share = learning_rate, config.warmup_share
        self._rows_per_step = config.gradient_accumulation * config.batch_rows
        self.parameter = adapter.parameter(slot)
        self.optimiser = torch.optim.AdamW(
            [self.parameter], lr=learning_rate, weight_decay=config.weight_decay, fused=True
        )

    @property
    def gradient(self) -> torch.Tensor:
        """Sum of what backward passes have given since it was zeroed: `[P]`."""
        assert self.parameter.grad is not None, "the adapter keeps one for every slot"
        return self.parameter.grad

    def noise(self, part: int) -> int:
        """What the dropout of one pass of the next step is made from: 31 bits."""
        text = f"{self.seed}:{self.step + 1}:{part}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) >> 1

    def take(self) -> None:
        """Take the next step with the gradient that is there."""
        self.step += 1
        factor = rate_factor(self.step, self.steps, self._warmup_share)
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate * factor
        self.optimiser.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the values and of AdamW's moments, float32 `[P]` each."""
        moments = self.optimiser.state.get(self.parameter, {})
        return {
            "values": self.parameter.detach().clone(),
            **{name: moments[name].clone() for name in MOMENTS if name in moments},
        }

    def set_state(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Go on from what `state` gave after so many steps; for a learner that has taken none."""
        with torch.no_grad():
            self.parameter.copy_(state["values"])
        rows = step * self._rows_per_step
        next(islice(self.rows, rows, rows), None)  # those that the steps before have read
        self.step = step
        if step > 0:
            device = self.parameter.device
            count = torch.tensor(float(step), device=device)
            moments = {name: state[name].to(device) for name in MOMENTS}
            self.optimiser.state[self.parameter] = {"step": count, **moments}


def draw(learners: Sequence[Learner], config: ExpertsConfig, device: torch.device) -> list[Batch]:
    """The next rows of all learners, learner by learner: a batch for each accumulated pass."""
    passes = []
    for _ in range(config.gradient_accumulation):
        rows = [row for learner in learners for row in islice(learner.rows, config.batch_rows)]
        passes.append(collate(rows, config.sequence_length, device))
    return passes


def take_step(
    model: LanguageModel,
    adapter: Adapter,
    learners: Sequence[Learner],
    passes: Sequence[Batch],
    config: ExpertsConfig,
) -> list[Step]:
    """Move every learner on by one optimiser step, over shared passes of the base.

    A learner's loss is the mean over all targets of its step, whichever of the accumulated passes
    they are in. One whose loss or gradient is not finite is left as it was; the others take their
    steps. On a CPU, equal seeds, rows and company give equal bits; other company changes no more
    than the last bits.

    Args:
        model: the base with its adapter.
        adapter: holds the learners' slots.
        learners: those that share the step; no two have the same slot.
        passes: from `draw`.
        config: clipping.

    Returns:
        What happened to each learner.
    """
    members = len(learners)
    targets = _sums([batch.shared_targets(members) for batch in passes])
    tokens = _sums([batch.shared_tokens(members) for batch in passes])
    weights = [1 / count for count in targets]
    losses = torch.zeros(members, device=model.model.device)
    for learner in learners:
        learner.gradient.zero_()
    slots = [learner.slot for learner in learners]
    for part, batch in enumerate(passes):
        with adapter.using(slots, [learner.noise(part) for learner in learners]):
            loss, sums = model.total_loss(batch, weights)
            loss.backward()  # type: ignore[no-untyped-call]
        losses += sums
    norms = torch.stack([_clip(learner.gradient, config.max_grad_norm) for learner in learners])
    measured = torch.stack([losses, norms]).tolist()  # the step's only wait for the device
    taken = [
        Step(total * weight, norm, count)
        for total, norm, weight, count in zip(*measured, weights, tokens, strict=True)
    ]
    for learner, step in zip(learners, taken, strict=True):
        if step.finite:
            learner.take()
    return taken


def rate_factor(step: int, steps: int, warmup_share: float) -> float:
    """Learning rate over its peak: a line up to 1, then a half cosine that ends at zero.

    The first step is above zero, and zero would be the step after the last, so that no step is
    spent on a rate of nothing.
    """
    warmup = math.ceil(warmup_share * steps)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def _sums(counts: Sequence[Sequence[int]]) -> list[int]:
    """Each learner's sum over the passes."""
    return [sum(each) for each in zip(*counts, strict=True)]


def _clip(gradient: torch.Tensor, limit: float) -> torch.Tensor:
    """Scale a gradient down to a norm, in place; returns the norm that it had."""
    norm: torch.Tensor = torch.linalg.vector_norm(gradient)
    gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
