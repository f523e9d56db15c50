"""Examples to packed rows: several documents in a row, none of which sees another.

A row carries position ids that start again at 0 with each document. With no attention mask given,
transformers derives from them the block-diagonal causal mask of whatever attention the model uses
(sliding windows included), so packed documents attend to themselves alone.

Knows nothing of models or training. Shapes: B rows, L tokens a row.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from expert_trainer.types import Example

if TYPE_CHECKING:
    import torch

IGNORED = -1
"""Owner of a position that predicts nothing."""
POOL_ROWS = 64
"""Rows that documents are drawn together for, so that short ones find company."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document that fits a row."""

    owner: int
    """Index of the document."""
    token_ids: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Packed rows as the model takes them; the first four are int64 `[B, L]`."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    """The token to predict after each position."""
    owners: torch.Tensor
    """Index of the document whose token is predicted there, or `IGNORED`."""
    wanted: torch.Tensor
    """Of the B L positions, those that predict: int64 `[N]`."""
    row_tokens: tuple[int, ...]
    """Tokens of each row that are not padding."""
    row_targets: tuple[int, ...]
    """Tokens of each row that are predicted."""

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.row_tokens)

    @property
    def targets(self) -> int:
        """Tokens that are predicted."""
        return sum(self.row_targets)

    def shared_tokens(self, members: int) -> list[int]:
        """Tokens of each of the members whose rows these are, member by member."""
        return _shares(self.row_tokens, members)

    def shared_targets(self, members: int) -> list[int]:
        """Predicted tokens of each of the members whose rows these are, member by member."""
        return _shares(self.row_targets, members)


def split(owner: int, example: Example, length: int) -> list[Piece]:
    """Cut an example into pieces of at most `length` tokens.

    Each piece starts with the last token of the one before, so that every target is predicted
    exactly once. Pieces without a target are left out.
    """
    ids = np.asarray(example.token_ids, dtype=np.int64)
    targets = np.asarray(example.targets, dtype=bool)
    pieces = []
    for start in range(0, max(len(ids) - 1, 1), length - 1):
        wanted = targets[start : start + length].copy()
        wanted[:1] = False
        if wanted.any():
            pieces.append(Piece(owner, ids[start : start + length], wanted))
    return pieces


def pack(pieces: Sequence[Piece], length: int) -> list[list[Piece]]:
    """Pack pieces into as few rows as best-fit decreasing needs.

    Each piece, longest first, goes into the fullest row that still holds it (arXiv 2404.10830,
    section 3.1, packs whole documents the same way). Ties keep the given order.
    """
    rows: list[list[Piece]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for piece in sorted(pieces, key=lambda piece: -len(piece.token_ids)):
        size = len(piece.token_ids)
        found = bisect.bisect_left(open_rows, (size, -1))
        if found < len(open_rows):
            left, row = open_rows.pop(found)
            rows[row].append(piece)
        else:
            left, row = length, len(rows)
            rows.append([piece])
        bisect.insort(open_rows, (left - size, row))
    return rows


def endless_rows(examples: Sequence[Example], length: int, seed: int) -> Iterator[list[Piece]]:
    """Rows for training, without end: every document once, then every document once more, …

    Documents are shuffled anew for each pass, and packed and shuffled in pools of `POOL_ROWS`
    rows; a pool of a small cluster spans several passes. The order depends on the seed alone.

    Raises:
        ValueError: no example has anything to predict.
    """
    pieces = [piece for i, example in enumerate(examples) for piece in split(i, example, length)]
    if not pieces:
        raise ValueError("no example has anything to predict")
    order = random.Random(seed)
    pool: list[Piece] = []
    pooled = 0
    while True:
        for piece in order.sample(pieces, len(pieces)):
            pool.append(piece)
            pooled += len(piece.token_ids)
            if pooled >= POOL_ROWS * length:
                rows = pack(pool, length)
                order.shuffle(rows)
                yield from rows
                pool, pooled = [], 0


def collate(rows: Sequence[Sequence[Piece]], length: int, device: torch.device | str) -> Batch:
    """Lay packed rows out as tensors; what is left of a row is padding that predicts nothing."""
    import torch

    shape = (len(rows), length)
    ids, positions, labels = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    owners = np.full(shape, IGNORED, dtype=np.int64)
    tokens = []
    for index, row in enumerate(rows):
        start = 0
        for piece in row:
            stop = start + len(piece.token_ids)
            ids[index, start:stop] = piece.token_ids
            positions[index, start:stop] = np.arange(stop - start)
            labels[index, start : stop - 1] = piece.token_ids[1:]
            owners[index, start : stop - 1] = np.where(piece.targets[1:], piece.owner, IGNORED)
            start = stop
        positions[index, start:] = np.arange(length - start)  # padding is a document of its own
        tokens.append(start)
    return Batch(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        labels=torch.from_numpy(labels).to(device),
        owners=torch.from_numpy(owners).to(device),
        wanted=torch.from_numpy(np.flatnonzero(owners != IGNORED)).to(device),
        row_tokens=tuple(tokens),
        row_targets=tuple((owners != IGNORED).sum(axis=1).tolist()),
    )


def _shares(counts: Sequence[int], members: int) -> list[int]:
    rows = len(counts) // members
    return [sum(counts[start : start + rows]) for start in range(0, len(counts), rows)]
