"""Documents that say the same: exact copies by their hashes, near ones by MinHash.

The first of several stands, so whoever wants held-out documents to win puts them first. Texts pass
through one at a time; what stays in memory is a few tens of bytes a document, and signatures lie on
disk. Knows nothing of files, splits or clusters.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expert_trainer.arrays import allocate

Booleans = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Signatures = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]

SHINGLE_WORDS = 5
PERMUTATIONS = 128
"""Of a signature; the similarity read off it has a standard error of at most 1 / (2 sqrt(128))."""
WANTED_RECALL = 0.995
"""Share of pairs at the threshold that must meet in a bucket."""
MOST_LEADERS = 256
"""Documents of a bucket that the others of it are compared with; beyond, boilerplate that fills a
bucket with texts which are otherwise unlike would cost the square of their number."""
_SEED = 1997
_BATCH_CHARACTERS = 1 << 19
_BATCH_TEXTS = 4096
_CACHED_WORDS = 1 << 18
_PAIRS_AT_ONCE = 1 << 13
_NO_WORDS = np.uint32(0xFFFFFFFF)

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
"""Runs of letters and digits; of scripts that put no space between words, each sign."""


def first_copies(hashes: Hashes) -> Booleans:
    """Which documents are the first of those with the same hash.

    Args:
        hashes: shape (N, 2).

    Returns:
        Shape (N,).
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    repeated = np.ones(max(len(hashes) - 1, 0), dtype=np.bool_)
    for column in hashes.T:
        ordered = column[order]
        repeated &= ordered[1:] == ordered[:-1]
    first = np.ones(len(hashes), dtype=np.bool_)
    first[order[1:]] = ~repeated  # the sort is stable, so a run begins with its first document
    return first


def near_copies(texts: Iterable[str], count: int, threshold: float, directory: Path) -> Booleans:
    """Which documents go because one before them is nearly the same.

    Two texts are compared by the Jaccard similarity of their sets of word 5-grams, estimated by
    MinHash (Broder 1997, On the resemblance and containment of documents, sections 3 and 4).
    Bands of each signature are hashed into buckets (Indyk and Motwani 1998, Approximate nearest
    neighbors, section 4), and within a bucket each text that still stands is compared with those
    before it. So any two that stand are less alike than the threshold, but for those that share no
    bucket (see WANTED_RECALL) or only one too full (MOST_LEADERS), and each that goes was like an
    earlier one, which may itself have gone later.

    Case, punctuation and spacing do not count. A text of fewer than five words is one 5-gram, so
    its copies alone are near it; one without any word is near to none.

    Args:
        texts: the documents, the most worth keeping first.
        count: how many they are, N.
        threshold: similarity from which one goes, above 0, at most 1.
        directory: for 700 bytes of working files a document; whoever made it removes it.

    Returns:
        Shape (N,), true for those that go.
    """
    if count == 0:
        return np.zeros(0, dtype=np.bool_)
    bands = plan_bands(threshold)
    signatures = allocate(directory / "signatures", np.uint32, (count, PERMUTATIONS))
    keys = allocate(directory / "bands", np.uint64, (bands.count, count))
    signer, place = Signer(), 0
    for batch in _batches(texts):
        signed = signer.sign(batch)
        signatures[place : place + len(batch)] = signed
        keys[:, place : place + len(batch)] = bands.keys(signed)
        place += len(batch)
    assert place == count, "as many texts as was said"
    standing = signatures[:, 0] != _NO_WORDS
    speaking = standing.copy()
    for band in keys:
        _thin_out(band, signatures, threshold, standing)
    gone: Booleans = speaking & ~standing
    return gone


@dataclass(frozen=True)
class Bands:
    """How a signature is cut: `count` bands of `rows` values."""

    count: int
    rows: int

    def recall(self, similarity: float) -> float:
        """Share of pairs of that similarity which agree in a band at least."""
        return 1.0 - (1.0 - similarity**self.rows) ** self.count

    def keys(self, signatures: Signatures) -> Hashes:
        """A number for each band of each signature, alike where the band is: (count, N)."""
        keys = np.zeros((self.count, len(signatures)), dtype=np.uint64)
        for row in range(self.rows):
            values = signatures[:, row : self.count * self.rows : self.rows].T
            keys = _mixed(keys ^ values.astype(np.uint64))
        return keys


def plan_bands(threshold: float) -> Bands:
    """The longest bands, so the fewest false alarms, with WANTED_RECALL at the threshold."""
    plans = [Bands(PERMUTATIONS // rows, rows) for rows in range(PERMUTATIONS, 0, -1)]
    wanted = (plan for plan in plans if plan.recall(threshold) >= WANTED_RECALL)
    return next(wanted, plans[-1])


class Signer:
    """Texts to MinHash signatures; the same in every process."""

    def __init__(self) -> None:
        random = np.random.default_rng(_SEED)
        numbers = random.integers(0, 2**64, (2, PERMUTATIONS), dtype=np.uint64)
        self._factors, self._addends = numbers[0] | np.uint64(1), numbers[1]
        self._places = random.integers(0, 2**64, SHINGLE_WORDS, dtype=np.uint64) | np.uint64(1)
        self._words = _WordHashes()

    def sign(self, texts: Sequence[str]) -> Signatures:
        """Signatures, shape (N, PERMUTATIONS); all ones for a text without a word."""
        words = [_WORD.findall(text.lower()) for text in texts]
        signatures = np.full((len(texts), PERMUTATIONS), _NO_WORDS)
        spoken = [index for index, found in enumerate(words) if found]
        if not spoken:
            return signatures
        shingles, starts = self._shingles([words[index] for index in spoken])
        values = np.empty_like(shingles)
        for column in range(PERMUTATIONS):
            # The top half of a * x + b mod 2^64: Dietzfelbinger's multiply-shift, for 128 orders.
            np.multiply(shingles, self._factors[column], out=values)
            values += self._addends[column]
            signatures[spoken, column] = np.minimum.reduceat(values, starts) >> np.uint64(32)
        return signatures

    def _shingles(self, words: list[list[str]]) -> tuple[Hashes, Ints]:
        """Hashes of the 5-grams of all texts, one after another, and where each text's begin."""
        padded = [[*found, *[""] * (SHINGLE_WORDS - len(found))] for found in words]
        lengths = np.array([len(found) for found in padded])
        hashes = np.fromiter(
            (self._words[word] for found in padded for word in found), np.uint64, lengths.sum()
        )
        total = len(hashes) - SHINGLE_WORDS + 1
        mixed = np.zeros(total, dtype=np.uint64)
        for offset, factor in enumerate(self._places):
            mixed += hashes[offset : offset + total] * factor
        counts = lengths - SHINGLE_WORDS + 1
        inside = np.ones(total, dtype=np.bool_)  # those that reach into the next text go
        for end in np.cumsum(lengths)[:-1]:
            inside[end - SHINGLE_WORDS + 1 : end] = False
        return _mixed(mixed[inside]), np.concatenate(([0], np.cumsum(counts)[:-1]))


class _WordHashes(dict[str, int]):
    """Hashes of words, the common ones looked up; forgets all of them when they are too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "little")
        return value


def _thin_out(band: Hashes, signatures: Signatures, threshold: float, standing: Booleans) -> None:
    """Compare those that share a bucket of one band; marks in `standing` who goes."""
    members, buckets = _crowded(np.flatnonzero(standing), band)
    for _ in range(MOST_LEADERS):
        if not members.size:
            return
        begins = np.flatnonzero(np.concatenate(([True], buckets[1:] != buckets[:-1])))
        sizes = np.diff(np.append(begins, len(members)))
        leaders = np.repeat(members[begins], sizes)
        alike = _similarity(signatures, leaders, members) >= threshold
        alike[begins] = False
        standing[members[alike]] = False
        rest = ~alike
        rest[begins] = False
        members, buckets = _in_company(members[rest], buckets[rest])


def _crowded(documents: Ints, band: Hashes) -> tuple[Ints, Hashes]:
    """The documents that share a bucket, by bucket and then in order, and their buckets."""
    keys = band[documents]
    order = np.argsort(keys, kind="stable")
    return _in_company(documents[order], keys[order])


def _in_company(members: Ints, buckets: Hashes) -> tuple[Ints, Hashes]:
    """Leave out those alone in their bucket; both are sorted by bucket."""
    same = buckets[1:] == buckets[:-1]
    shared = np.zeros(len(buckets), dtype=np.bool_)
    shared[1:] |= same
    shared[:-1] |= same
    return members[shared], buckets[shared]


def _similarity(signatures: Signatures, left: Ints, right: Ints) -> npt.NDArray[np.float64]:
    """Share of equal values of each pair's signatures, shape (pairs,)."""
    found = np.empty(len(left))
    for start in range(0, len(left), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        found[part] = (signatures[left[part]] == signatures[right[part]]).mean(axis=1)
    return found


def _mixed(values: Hashes) -> Hashes:
    """Spread every bit over all others: the finaliser of SplitMix64 (Steele and others 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
