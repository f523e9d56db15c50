"""The features of a text that the student sees: hashes of its words, their pairs and their pieces.

Knows nothing of clusters or of what is learned. The same text has the same features in every
process: nothing here depends on Python's own hash.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WORDS = 100
"""Words of a text that are read: about what the embedder reads of it by default."""

CHARACTERS = 1024
"""Characters of a text that are read: about `WORDS` words of nine and a space."""

PIECE_LENGTHS = (3, 4, 5)
"""Characters of a word's pieces, by which a word that was never seen resembles known ones."""

PIECE_CHARACTERS = 24
"""Characters of a word that are cut to pieces."""

# Scripts written without spaces between words: each character is a word of its own, so that the
# pairs of words are pairs of characters. Thai to Myanmar, Khmer, kana, the Han blocks.
_UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002fa1f"
)
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]|[^\w\s]")

_BOUNDARY = 0x5BD1E995
_PIECE_SEED = 0x2545F491
_PAIR, _SKIP = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)
_OTHER = np.uint32(0xC2B2AE3D)
_PAIRED, _SKIPPED = _PAIR ^ _OTHER, _SKIP ^ _OTHER
_FIFTEEN, _SIXTEEN = np.uint32(15), np.uint32(16)

Hashes = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Features:
    """Features of N texts, flat: those of a text lie anywhere, `owner` says whose each is."""

    hashes: Hashes
    """Shape (F,)."""
    owner: Indices
    """Place of the text of each feature, shape (F,)."""
    words: Indices
    """Words of each text, at least 1, shape (N,)."""


def words_of(text: str) -> list[str]:
    """The first words of a text, without case; a mark of punctuation is a word."""
    beginning = text[:CHARACTERS]
    if not beginning.isascii():
        beginning = unicodedata.normalize("NFKC", beginning)[:CHARACTERS]
    return _WORD.findall(beginning.lower())[:WORDS]


def word_hash(word: str) -> int:
    """The hash of a word, 32 bits; lone surrogates are letters like any other."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def piece_hashes(word: str) -> list[int]:
    """Hashes of the pieces of a word, its ends marked; none for a word of one character."""
    if len(word) < 2:
        return []
    marked = f"<{word[:PIECE_CHARACTERS]}>"
    return [
        zlib.crc32(marked[start : start + length].encode("utf-8", "surrogatepass"), _PIECE_SEED)
        for length in PIECE_LENGTHS
        for start in range(len(marked) - length + 1)
    ]


def features_of(words: Sequence[Sequence[str]]) -> Features:
    """Hashes of the words, neighbours, and neighbours but one of each text, its ends included."""
    hashes: list[int] = []
    for text in words:
        hashes.append(_BOUNDARY)
        hashes.extend([word_hash(word) for word in text])
        hashes.append(_BOUNDARY)
    counts = np.array([len(text) for text in words], dtype=np.int64)
    single = np.array(hashes, dtype=np.uint32)
    # One multiplication of each side and shifts: order counts, and no low bits are lost.
    other = single ^ (single >> _FIFTEEN)
    pair = single[:-1] * _PAIR + other[1:] * _PAIRED
    skip = single[:-2] * _SKIP + other[2:] * _SKIPPED
    if len(counts) == 1:
        owners = np.zeros(len(single) + len(pair) + len(skip), dtype=np.int64)
    else:
        owner = np.repeat(np.arange(len(counts)), counts + 2)
        near, far = owner[:-1] == owner[1:], owner[:-2] == owner[2:]
        pair, skip = pair[near], skip[far]
        owners = np.concatenate([owner, owner[:-1][near], owner[:-2][far]])
    mixed = np.concatenate([pair, skip])
    found = np.concatenate([single, mixed ^ (mixed >> _SIXTEEN)])
    return Features(hashes=found, owner=owners, words=np.maximum(counts, 1))
