"""Measurements of a model as it stands: held-out losses and fingerprints.

Knows nothing of training; whether an adapter is active is the caller's affair.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from configs.manifest import Fingerprint
from expert_trainer.losses import LanguageModel
from expert_trainer.packing import IGNORED, collate, pack, split
from expert_trainer.types import Example

PROBE_TEXT = (
    "The quick brown fox counts 3 lazy dogs, writes a function that returns their names, "
    "and asks: what is the capital of France?"
)
PROBE_TOKENS = 32


def document_losses(
    model: LanguageModel,
    examples: Sequence[Example],
    length: int,
    batch_rows: int,
    *,
    as_trained: bool = False,
) -> np.ndarray:
    """Loss of each document: float64 `[documents, 2]`, its nats and its number of targets.

    Documents are packed; since none sees another, each gets the loss that it has alone. One longer
    than a row is measured in pieces of a row each.

    Args:
        model: the base; the caller says which adapter is active.
        examples: the documents.
        length: tokens of a row.
        batch_rows: rows of a pass.
        as_trained: in the training's arithmetic rather than in that of the model's weights.
    """
    sums = np.zeros((len(examples), 2))
    pieces = [piece for i, example in enumerate(examples) for piece in split(i, example, length)]
    rows = pack(pieces, length)
    for start in range(0, len(rows), batch_rows):
        batch = collate(rows[start : start + batch_rows], length, model.model.device)
        losses = model.token_losses(batch, as_trained=as_trained).double().cpu().numpy()
        owners = batch.owners[batch.owners != IGNORED].cpu().numpy()
        np.add.at(sums[:, 0], owners, losses)
        np.add.at(sums[:, 1], owners, 1)
    return sums


def mean_loss(sums: np.ndarray) -> float | None:
    """Nats per token over all documents of `document_losses`; none without tokens."""
    nats, tokens = sums.sum(axis=0)
    return float(nats / tokens) if tokens else None


def sample(examples: Sequence[Example], max_targets: int, seed: int) -> list[Example]:
    """Documents, drawn with the seed, whose targets stay within a limit; at least one if any."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    kept: list[Example] = []
    total = 0
    for example in order:
        total += example.target_count
        if kept and total > max_targets:
            break
        kept.append(example)
    return kept


def sample_tokens(examples: Sequence[Example], max_tokens: int, seed: int) -> list[Example]:
    """Documents, drawn with the seed, of at most so many tokens; none if all are longer."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    kept: list[Example] = []
    for example in order:
        if len(example.token_ids) <= max_tokens:
            kept.append(example)
            max_tokens -= len(example.token_ids)
    return kept


def probe_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """The fixed probe: up to 32 token ids, at least 2, inside the vocabulary."""
    ids = list(tokenizer(PROBE_TEXT)["input_ids"])[:PROBE_TOKENS]
    return [min(token, vocab_size - 1) for token in [*ids, 0, 0][: max(len(ids), 2)]]


@torch.no_grad()
def fingerprint(model: LanguageModel, probe: Sequence[int]) -> Fingerprint:
    """Log-probabilities of the probe's tokens after the first, in the weights' own arithmetic."""
    ids = torch.tensor(probe)
    logits = model.model(input_ids=ids[None].to(model.model.device), use_cache=False).logits[0]
    logprobs = logits[:-1].float().log_softmax(-1).cpu()
    chosen = logprobs.gather(-1, ids[1:, None])[:, 0]
    return Fingerprint(token_ids=ids.tolist(), logprobs=chosen.tolist())
