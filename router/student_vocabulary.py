"""The features that the student knows: those seen often enough, each a row of its table.

A word's row holds its pieces too once the table is folded, so that only words never seen are cut
to pieces while serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from router.student_features import Features, Hashes, Indices, features_of, piece_hashes, word_hash
from router.student_training import Bags, Layers, gathered

Floats = npt.NDArray[np.float32]

SEEN = 2
"""Times that a feature was seen before it counts."""
FEW_TEXTS = 200
"""Of fewer texts every feature counts."""
MOST_FEATURES = 1 << 17
"""Rows of the table: the features seen most often."""
MOST_WORDS = 1_000_000
"""Words fitted on: of long texts fewer count."""
DIVISOR = np.float32(3 / 8)
"""A text's sum of rows is divided by this times its words: each word brings three features, and
eight times their mean is about one in size."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces of each distinct word: those of word w lie at `bounds[w]:bounds[w + 1]`."""

    words: list[str]
    hashes: Hashes
    bounds: Indices

    @classmethod
    def of(cls, words: list[str]) -> Pieces:
        """Cut words to pieces."""
        cut = [piece_hashes(word) for word in words]
        bounds = np.concatenate([[0], np.cumsum([len(pieces) for pieces in cut])])
        return cls(
            words,
            np.array(list(chain.from_iterable(cut)), dtype=np.uint32),
            bounds.astype(np.int64),
        )


class Vocabulary:
    """The hashes known, rising, shape (V,): a feature's row is its place among them."""

    def __init__(self, hashes: Hashes, pieces: Pieces | None = None) -> None:
        self.hashes = hashes
        self._pieces = pieces

    @property
    def size(self) -> int:
        """Features known, V."""
        return len(self.hashes)

    @classmethod
    def fit(cls, texts: Sequence[Sequence[str]]) -> tuple[Vocabulary, Bags]:
        """The vocabulary of texts given as words, and the bags of as many of these, from the first
        on, as hold `MOST_WORDS` words."""
        ends = np.cumsum([len(text) for text in texts])
        texts = texts[: max(1, int(np.searchsorted(ends, MOST_WORDS, side="right")))]
        features = features_of(texts)
        numbers: dict[str, int] = {}
        words = np.array(
            [numbers.setdefault(word, len(numbers)) for text in texts for word in text],
            dtype=np.int64,
        )
        pieces = Pieces.of(list(numbers))
        where, lengths = gathered(pieces.bounds, words)
        owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        hashes = np.concatenate([features.hashes, pieces.hashes[where]])
        owners = np.concatenate([features.owner, np.repeat(owner, lengths)])
        weights = np.ones(len(hashes), dtype=np.float32)
        weights[len(features.hashes) :] = np.repeat(1 / np.maximum(lengths, 1), lengths)
        vocabulary = cls(_frequent(hashes, SEEN if len(texts) >= FEW_TEXTS else 1), pieces)
        rows, known = vocabulary.rows(hashes)
        rows, owners, weights = rows[known], owners[known], weights[known]
        order = np.argsort(owners, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(texts)))])
        divisors = features.words.astype(np.float32) * DIVISOR
        bags = Bags(rows[order].astype(np.int32), weights[order], bounds.astype(np.int64), divisors)
        return vocabulary, bags

    def rows(self, hashes: Hashes) -> tuple[Indices, npt.NDArray[np.bool_]]:
        """Rows of features, and which of these are known; the row of another means nothing."""
        rows = self.hashes.searchsorted(hashes)
        return rows, self.hashes.take(rows, mode="clip") == hashes

    def folded(self, layers: Layers) -> tuple[Vocabulary, Layers]:
        """Itself and the layers as they serve: the pieces added to the words they make up, and the
        table rounded to what is saved."""
        assert self._pieces is not None, "only what was just fitted is folded"
        hashes = np.array([word_hash(word) for word in self._pieces.words], dtype=np.uint32)
        table = layers.table_VE.copy()
        for number in np.flatnonzero(self.rows(hashes)[1]).tolist():
            row = int(self.rows(hashes[number : number + 1])[0][0])
            table[row] += self._piece_mean(number, layers.table_VE)
        table = table.astype(np.float16).astype(np.float32)
        return Vocabulary(self.hashes), Layers(
            table, layers.inner_EH, layers.inner_H, layers.outer_HK, layers.outer_K
        )

    def sums(
        self, features: Features, words: Sequence[Sequence[str]], table_VE: Floats
    ) -> tuple[Floats, Floats]:
        """Sums of the rows of each text's features over its divisor, shape (N, E), and the share
        of its features that are unknown, shape (N,)."""
        rows, known = self.rows(features.hashes)
        texts = len(words)
        if texts == 1:
            found = rows[known]
            sums = table_VE.take(found, axis=0).sum(axis=0, keepdims=True)
            unknown = np.array([1 - len(found) / len(rows)], dtype=np.float32)
        else:
            sums = np.zeros((texts, table_VE.shape[1]), dtype=np.float32)
            owner = features.owner[known]
            order = np.argsort(owner, kind="stable")
            counts = np.bincount(owner, minlength=texts)
            starts = (np.cumsum(counts) - counts)[counts > 0]
            if len(starts):
                sums[counts > 0] = np.add.reduceat(table_VE[rows[known][order]], starts)
            totals = np.bincount(features.owner, minlength=texts)
            unknown = (1 - counts / totals).astype(np.float32)
        self._add_unknown_words(sums, known, words, table_VE)
        return sums / (features.words.astype(np.float32) * DIVISOR)[:, None], unknown

    def _add_unknown_words(
        self,
        sums: Floats,
        known: npt.NDArray[np.bool_],
        words: Sequence[Sequence[str]],
        table_VE: Floats,
    ) -> None:
        # The first features are the words in order, and the ends of each text around its own.
        start = 0
        for number, text in enumerate(words):
            for place in (~known[start + 1 : start + 1 + len(text)]).nonzero()[0].tolist():
                pieces = np.array(piece_hashes(text[place]), dtype=np.uint32)
                if len(pieces):
                    rows, seen = self.rows(pieces)
                    sums[number] += table_VE[rows[seen]].sum(axis=0) / np.float32(len(pieces))
            start += len(text) + 2

    def _piece_mean(self, number: int, table_VE: Floats) -> Floats:
        assert self._pieces is not None
        low, high = self._pieces.bounds[number : number + 2].tolist()
        rows, seen = self.rows(self._pieces.hashes[low:high])
        mean: Floats = table_VE[rows[seen]].sum(axis=0) / np.float32(max(1, high - low))
        return mean


def _frequent(hashes: Hashes, least: int) -> Hashes:
    found, counts = np.unique(hashes, return_counts=True)
    found, counts = found[counts >= least], counts[counts >= least]
    if len(found) > MOST_FEATURES:
        found = np.sort(found[np.argsort(-counts, kind="stable")[:MOST_FEATURES]])
    return found
