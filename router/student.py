"""The student: what the embedder would say of a text, guessed from its words in microseconds.

Knows nothing of the embedder or of routers: it is fitted on texts and their cosines, and a guess
comes with a confidence over which others set their threshold. Guessing is plain numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from router.errors import RouterFormatError
from router.guess import TEMPERATURE, Guess, best_logits, is_short
from router.student_confidence import MEASURES, Seen, confidence_of, measures_of, shape_of, unfitted
from router.student_features import features_of, words_of
from router.student_training import Cosines, Layers, best_targets, train
from router.student_vocabulary import Vocabulary

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

FORMAT = 2
MOST_TEXTS = 50_000
"""Texts fitted on; a sample of more."""
BATCH = 256


class Student:
    """A bag of hashed features, one hidden layer and a confidence; see `fit`."""

    def __init__(
        self, vocabulary: Vocabulary, layers: Layers, confidence: Floats | None = None
    ) -> None:
        self._vocabulary = vocabulary
        self._layers = layers
        self._confidence = unfitted(len(layers.outer_K)) if confidence is None else confidence

    @property
    def clusters(self) -> int:
        """Clusters that it tells apart, K."""
        return len(self._layers.outer_K)

    @classmethod
    def fit(
        cls, texts: Sequence[str], cosines: Cosines, *, seed: int, threads: int | None = None
    ) -> Student:
        """Learn to guess the cosines of texts from their words; how sure of it, `with_confidence`
        tells.

        The same for a seed in every process, on the same number of threads. Time and memory are
        bounded: at most `MOST_TEXTS` texts count, and of a long text its beginning.

        Args:
            texts: N texts, at least one.
            cosines: the embedder's, shape (N, K), or a function from numbers of texts, shape (n,),
                to theirs, shape (n, K), for more than memory should hold.
            seed: of the sample and the training.
            threads: of torch; one where none is given, which other work on the machine slows least.
        """
        rng = np.random.default_rng(seed)
        # Any order: the vocabulary takes as many of the first as it can.
        chosen = rng.permutation(len(texts))[:MOST_TEXTS].astype(np.int64)
        vocabulary, bags = Vocabulary.fit([words_of(texts[place]) for place in chosen])
        targets = best_targets(cosines, chosen[: len(bags.divisors)])
        layers = train(bags, targets, vocabulary.size, seed=seed, threads=threads or 1)
        return cls(*vocabulary.folded(layers))

    def with_confidence(self, coefficients: Floats) -> Student:
        """The same student, as sure as these coefficients say: see `student_confidence`."""
        return Student(self._vocabulary, self._layers, coefficients)

    def guess(self, text: str) -> Guess:
        """Guess one text, of any length and any script."""
        return self._guess((text,))[0]

    def guess_many(self, texts: Sequence[str]) -> list[Guess]:
        """Guess texts, in the order given, each as `guess` does but for rounding."""
        starts = range(0, len(texts), BATCH)
        return list(chain.from_iterable(self._guess(texts[at : at + BATCH]) for at in starts))

    def seen(self, texts: Sequence[str]) -> Seen:
        """What is seen of its guesses at texts, one at least, to find out how sure it may be."""
        starts = range(0, len(texts), BATCH)
        return Seen.joined([self._seen(texts[at : at + BATCH]) for at in starts])

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """What was learned, to be saved as tensors."""
        layers = self._layers
        return {
            "hashes": self._vocabulary.hashes.astype(np.int64),
            "table": layers.table_VE.astype(np.float16),
            "inner": layers.inner_EH,
            "inner_bias": layers.inner_H,
            "outer": layers.outer_HK,
            "outer_bias": layers.outer_K,
            "confidence": self._confidence,
        }

    def settings(self) -> dict[str, int | float | str]:
        """What the arrays have to agree with, to be saved as JSON."""
        return {
            "format": FORMAT,
            "temperature": TEMPERATURE,
            "clusters": self.clusters,
            "features": self._vocabulary.size,
        }

    @classmethod
    def restore(
        cls,
        arrays: Mapping[str, npt.NDArray[np.generic]],
        settings: Mapping[str, int | float | str],
    ) -> Student:
        """The student that `arrays` and `settings` describe.

        Raises:
            RouterFormatError: of another format, incomplete, or the two disagree.
        """
        try:
            if settings["format"] != FORMAT or settings["temperature"] != TEMPERATURE:
                raise RouterFormatError(
                    "the router's student has a format this version cannot read"
                )
            hashes = np.asarray(arrays["hashes"])
            table, inner, inner_bias, outer, outer_bias, confidence = (
                np.asarray(arrays[name], dtype=np.float32)
                for name in ("table", "inner", "inner_bias", "outer", "outer_bias", "confidence")
            )
            features, clusters = settings["features"], settings["clusters"]
        except (KeyError, TypeError, ValueError):
            raise RouterFormatError("the router's student is incomplete or damaged") from None
        layers = Layers(table, inner, inner_bias, outer, outer_bias)
        if (
            hashes.shape != (features,)
            or outer_bias.shape != (clusters,)
            or not _whole(hashes, layers, confidence)
        ):
            raise RouterFormatError("the parts of the router's student do not fit each other")
        return cls(Vocabulary(hashes.astype(np.uint32)), layers, confidence)

    def _guess(self, texts: Sequence[str]) -> list[Guess]:
        seen = self._seen(texts)
        return seen.guesses(confidence_of(seen, self._confidence))

    def _seen(self, texts: Sequence[str]) -> Seen:
        logits_NK, unknown_N, words_N = self._logits(texts)
        values_NT, best_NT = best_logits(logits_NK)
        measures_NM = measures_of(logits_NK, values_NT, unknown_N, words_N)
        short_N = np.array([is_short(text) for text in texts], dtype=np.bool_)
        return Seen(values_NT, best_NT, measures_NM, short_N)

    def _logits(self, texts: Sequence[str]) -> tuple[Floats, Floats, Indices]:
        words = [words_of(text) for text in texts]
        features = features_of(words)
        sums_NE, unknown_N = self._vocabulary.sums(features, words, self._layers.table_VE)
        layers = self._layers
        hidden_NH = np.maximum(sums_NE @ layers.inner_EH + layers.inner_H, 0)
        return hidden_NH @ layers.outer_HK + layers.outer_K, unknown_N, features.words


def _whole(hashes: npt.NDArray[Any], layers: Layers, confidence: Floats) -> bool:
    width, hidden = layers.inner_EH.shape if layers.inner_EH.ndim == 2 else (-1, -1)
    return (
        hashes.dtype.kind in "iu"
        and hashes.size > 0
        and bool(np.all(hashes[1:] > hashes[:-1]))
        and int(hashes[0]) >= 0
        and int(hashes[-1]) < 2**32
        and layers.table_VE.shape == (hashes.size, width)
        and layers.inner_H.shape == (hidden,)
        and layers.outer_HK.shape == (hidden, layers.outer_K.size)
        and confidence.shape == shape_of(MEASURES, layers.outer_K.size)
        and all(np.isfinite(part).all() for part in (*_parts(layers), confidence))
    )


def _parts(layers: Layers) -> Iterator[Floats]:
    yield from (layers.table_VE, layers.inner_EH, layers.inner_H, layers.outer_HK, layers.outer_K)
