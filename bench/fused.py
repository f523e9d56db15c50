"""Experts trained together over one pass of the base, against the same experts one after another.

For 1, 2, 4, 8 and 16 experts with small batches of their own (2 rows of 256 tokens, and 1 row) the
same number of optimiser steps is taken both ways, in turns, in one process; the figures are
medians over the turns. The base is a Llama of the demo's size with random weights, on a CPU with
as many threads as an actor has cores, and, where there is a GPU, one of TinyLlama's shape there.

    .venv/bin/python bench/fused.py [--quick] [--report FILE]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from _report import Report, parser

from configs.schema import ExpertsConfig
from deploy.output import note, say, table

LENGTH = 256
COUNTS = (1, 2, 4, 8, 16)
TINY_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Setting:
    """One base on one device."""

    key: str
    device: str
    dtype: str
    turns: int
    steps: int
    """Steps of each expert in a turn."""


def settings(quick: bool) -> list[Setting]:
    import torch

    cpu = Setting("cpu", "cpu", "float32", turns=3 if quick else 9, steps=2)
    if not torch.cuda.is_available():
        return [cpu]
    return [cpu, Setting("cuda", "cuda:0", "bfloat16", turns=3 if quick else 9, steps=5)]


def make_base(setting: Setting) -> Any:
    """A base of random weights on the setting's device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from expert_trainer.base import Base
    from expert_trainer.pretraining import SmallLlama

    small = SmallLlama()
    shape = {
        "vocab_size": small.vocabulary,
        "hidden_size": small.hidden,
        "intermediate_size": small.intermediate,
        "num_hidden_layers": small.layers,
        "num_attention_heads": small.heads,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    with device:
        config = LlamaConfig(
            **(shape if setting.device == "cpu" else TINY_LLAMA), attn_implementation="sdpa"
        )
        model = LlamaForCausalLM(config).to(dtype)
    return Base(model.requires_grad_(False).eval(), None, device, dtype)


class Race:
    """A base with an adapter, and documents of 40 to 250 random tokens."""

    def __init__(self, setting: Setting) -> None:
        from expert_trainer.base import training_dtype
        from expert_trainer.lora import Adapter
        from expert_trainer.losses import LanguageModel
        from expert_trainer.types import Example

        self.setting = setting
        self.config = ExpertsConfig(rank=8, alpha=16, sequence_length=LENGTH)
        self.base = make_base(setting)
        self.adapter = Adapter(self.base, self.config, "bench")
        self.model = LanguageModel(self.base.model, training_dtype(self.config, self.base))
        random = np.random.default_rng(0)
        vocabulary = self.base.model.config.vocab_size
        self.examples = [
            Example(random.integers(0, vocabulary, size).tolist(), [False] + [True] * (size - 1))
            for size in random.integers(40, 250, 400)
        ]

    def learners(self, count: int, rows: int) -> tuple[list[Any], ExpertsConfig]:
        from expert_trainer.optimise import Learner
        from expert_trainer.packing import endless_rows

        config = self.config.model_copy(update={"batch_rows": rows})
        self.adapter.resize(count)
        learners = []
        for slot in range(count):
            self.adapter.reset(slot, slot)
            stream = endless_rows(self.examples, LENGTH, slot)
            learners.append(
                Learner(
                    self.adapter, slot, stream, config, steps=10**6, learning_rate=1e-3, seed=slot
                )
            )
        return learners, config

    def seconds(self, groups: Sequence[Sequence[Any]], config: ExpertsConfig) -> float:
        """Wall time of the turn's steps, group after group."""
        import torch

        from expert_trainer.optimise import draw, take_step

        begin = time.perf_counter()
        for group in groups:
            for _ in range(self.setting.steps):
                passes = draw(group, config, self.base.device)
                take_step(self.model, self.adapter, group, passes, config)
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def compare(self, count: int, rows: int) -> tuple[float, float, float]:
        """Tokens per second together and one after another, and the median ratio of the turns."""
        learners, config = self.learners(count, rows)
        ways = ([learners], [[learner] for learner in learners])
        tokens = count * rows * LENGTH * self.setting.steps
        for way in ways:
            self.seconds(way, config)
        times = [[self.seconds(way, config) for way in ways] for _ in range(self.setting.turns)]
        together, apart = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(one / two for two, one in times)
        return tokens / together, tokens / apart, ratio


def main() -> int:
    """Run it; the exit code says whether every goal was met."""
    arguments = parser("experts trained together against one after another")
    arguments.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    options = arguments.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    report = Report("fused", conditions={"threads": options.threads, "row_tokens": LENGTH})
    lines = []
    for setting in settings(options.quick):
        race = Race(setting)
        report.conditions[setting.key] = str(race.model.training_dtype)
        for rows in (2, 1):
            for count in COUNTS:
                turns = max(2, setting.turns * 4 // (count + 3)) if options.quick else setting.turns
                race.setting = replace(setting, turns=turns)
                together, apart, ratio = race.compare(count, rows)
                name = f"{setting.key}_{rows}x{LENGTH}_experts_{count}"
                report.add(f"{name}_tokens_per_s", together, "tokens/s")
                report.add(f"{name}_ratio", ratio, "", None)
                lines.append(
                    [setting.key, rows, count, rows * count * LENGTH, together, apart, ratio]
                )
        best = max(line[4] for line in lines if line[0] == setting.key)
        enough = min(line[3] for line in lines if line[0] == setting.key and line[4] > 0.95 * best)
        report.add(f"{setting.key}_tokens_per_pass", enough, "tokens")
        note(f"  {setting.key}: a pass of {enough} tokens is within 5% of the fastest")
    headings = ["device", "rows", "experts", "tokens a pass", "together", "one by one", "ratio"]
    say(table(headings, lines))
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
