"""The encoder: a student of a few of the embedder's own layers, between the first student and it.

It is asked where the first student is not sure, reads words in their order, and costs a fraction
of the embedder. Knows nothing of how it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from router.encoder_graph import ENTRY, WORDS, graph_of, whole
from router.errors import RouterFormatError
from router.guess import (
    TEMPERATURE,
    Floats,
    Guess,
    Indices,
    best_logits,
    blended,
    estimates_of,
    guesses_of,
    lead_confidences,
)
from router.quantization import LEVELS, SAMPLES, levels_here, quantize
from router.student_confidence import (
    MEASURES_OF_TWO,
    Seen,
    confidence_of,
    seen_of_two,
    shape_of,
    unfitted,
)
from router.tokens import Ids, in_batches, padded, session_of, tokens_of

FORMAT = 1
TOKENS = 128
"""Most tokens of a text that it reads, where the embedder reads more."""
TOKENIZER, CONFIDENCE = "tokenizer", "confidence"


class Encoder:
    """A `SecondGuesser` over a transformer of few layers."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], settings: Mapping[str, Any]) -> None:
        """Take what training made.

        Args:
            arrays: as `arrays` gives them.
            settings: as `settings` gives them.

        Raises:
            RouterFormatError: of another format, incomplete, or the two disagree.
        """
        try:
            if settings["format"] != FORMAT or settings["temperature"] != TEMPERATURE:
                raise RouterFormatError(
                    "the router's encoder has a format this version cannot read"
                )
            layers, heads, self._clusters = (
                int(settings[name]) for name in ("layers", "heads", "clusters")
            )
            levels = int(settings.get("levels", LEVELS + 1))
            fits = whole(arrays, layers, heads, self._clusters)
            self._confidence = arrays.get(CONFIDENCE, unfitted(self._clusters, MEASURES_OF_TWO))
            self._tokenizer = _tokenizer_of(arrays[TOKENIZER])
        except (KeyError, TypeError, ValueError):
            raise RouterFormatError("the router's encoder is incomplete or damaged") from None
        fits = (
            fits
            and self._confidence.shape == shape_of(MEASURES_OF_TWO, self._clusters)
            and bool(np.isfinite(self._confidence).all())
        )
        if not fits or self._tokenizer.get_vocab_size() > len(arrays[WORDS]):
            raise RouterFormatError("the parts of the router's encoder do not fit each other")
        self._arrays, self._settings = dict(arrays), dict(settings)
        self._tokens = len(arrays[ENTRY[0]])
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._tokens)
        others = {TOKENIZER, CONFIDENCE}
        computed = {name: array for name, array in arrays.items() if name not in others}
        graph = graph_of(computed, layers, heads)
        if levels <= levels_here():  # else in 32 bits, whose guesses are hardly worse
            ids = tokens_of(self._tokenizer, SAMPLES, self._tokens)
            graph = quantize(graph, [_inputs([each]) for each in ids], levels)
        self._session = session_of(graph.SerializeToString())

    def guess(self, text: str) -> Guess:
        """Guess one text, of any length and any script."""
        return self.guess_many((text,))[0]

    def guess_many(self, texts: Sequence[str]) -> list[Guess]:
        """Guess texts, in the order given, each as `guess` does."""
        if not texts:
            return []
        values_NT, best_NT = self._best(texts)
        return guesses_of(values_NT, best_NT, lead_confidences(values_NT))

    def guess_after(self, firsts: Sequence[Guess], texts: Sequence[str]) -> list[Guess]:
        """Guess texts together with another student, whose guesses are given."""
        if not texts:
            return []
        seen = self.seen_after(firsts, texts)
        return seen.guesses(confidence_of(seen, self._confidence))

    def seen_after(self, firsts: Sequence[Guess], texts: Sequence[str]) -> Seen:
        """What is seen of its guesses at texts, one at least, together with another student's, to
        find out how sure they may be."""
        values_NT, best_NT = self._best(texts)
        return seen_of_two(*blended(firsts, estimates_of(values_NT), best_NT), texts)

    def with_confidence(self, coefficients: Floats) -> Encoder:
        """The same encoder, whose guesses with another student are as sure as these coefficients
        say: see `student_confidence`."""
        other = copy(self)
        other._confidence = coefficients
        other._arrays = {**self._arrays, CONFIDENCE: coefficients}
        return other

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What was learned, to be saved as tensors."""
        return dict(self._arrays)

    def settings(self) -> dict[str, Any]:
        """What the arrays have to agree with, to be saved as JSON."""
        return dict(self._settings)

    def _best(self, texts: Sequence[str]) -> tuple[Floats, Indices]:
        """The best logits of texts, falling, and their clusters: of shape (N, T)."""
        ids = tokens_of(self._tokenizer, texts, self._tokens)
        return best_logits(in_batches(ids, self._clusters, self._logits))

    def _logits(self, ids: Ids) -> Floats:
        """Of texts, given as tokens: shape (B, K)."""
        logits_BK: Floats
        (logits_BK,) = self._session.run(None, _inputs(ids))
        return logits_BK


def _inputs(ids: Ids) -> dict[str, npt.NDArray[Any]]:
    """What the graph is given for texts."""
    ids_BT, mask_BT = padded(ids)
    mask_BT[:, 0] = 1  # of no tokens at all, the mean of one
    places_T = np.arange(ids_BT.shape[1])
    return {"ids": ids_BT, "mask": mask_BT.astype(np.int32), "places": places_T}


def _tokenizer_of(content: npt.NDArray[Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content.astype(np.uint8).tobytes().decode())
    except Exception as error:  # the library raises what it pleases
        raise RouterFormatError("the tokenizer of the router's encoder is damaged") from error
