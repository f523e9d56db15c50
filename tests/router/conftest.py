"""The real embedder, once per run; a quick fake one; and a mixture of clearly different texts."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from configs.schema import RouterConfig
from router.embedder import SentenceEmbedder, load_embedder


class WordEmbedder:
    """An embedder without a model: texts that share words are near each other."""

    def __init__(self, digest: str = "words", dimension: int = 32) -> None:
        self.name = "words"
        self.dimension = dimension
        self.digest = digest
        self.calls: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.calls.append(list(texts))
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for index, text in enumerate(texts):
            vector = sum(_word(word, self.dimension) for word in text.lower().split() or [""])
            vectors[index] = vector / np.linalg.norm(vector)
        return vectors


@cache
def _word(word: str, dimension: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(dimension)


@dataclass(frozen=True)
class Mixture:
    """Texts of three topics, interleaved, and held-out texts of the same."""

    texts: list[str]
    topics: list[int]
    heldout: list[str]
    heldout_topics: list[int]


def _mixture() -> Mixture:
    templates = [
        ("{0} the {1} in a {2} pan", "fry bake roast", "onions chicken potatoes fish", "hot deep"),
        (
            "the {1} {0} the {2} match",
            "won lost drew",
            "striker goalkeeper team coach",
            "cup league",
        ),
        ("{0} the {1} {2} in python", "sort reverse parse", "list string file tree", "fast lazily"),
    ]
    everything = [
        (pattern.format(*words), topic)
        for topic, (pattern, *slots) in enumerate(templates)
        for words in product(*(slot.split() for slot in slots))
    ]
    order = np.random.default_rng(5).permutation(len(everything))
    shuffled = [everything[index] for index in order]
    train, heldout = shuffled[12:], shuffled[:12]
    return Mixture(
        [text for text, _ in train],
        [topic for _, topic in train],
        [text for text, _ in heldout],
        [topic for _, topic in heldout],
    )


@pytest.fixture(scope="session")
def mixture() -> Mixture:
    return _mixture()


@pytest.fixture
def words() -> WordEmbedder:
    return WordEmbedder()


@pytest.fixture(scope="session")
def minilm() -> SentenceEmbedder:
    return load_embedder(
        "all-MiniLM-L6-v2", device="cpu", batch_size=32, max_tokens=RouterConfig().max_tokens
    )
