"""The encoder: a student of a few of the embedder's own layers, between the first student and it.

It is asked where the first student is not sure, reads words in their order, and costs a fraction
of the embedder. Knows nothing of how it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from router.encoder_graph import ENTRY, WORDS, session_of, whole
from router.errors import RouterFormatError
from router.guess import TEMPERATURE, Floats, Guess, best_logits, guesses_of
from router.student_confidence import UNFITTED, confidence_of, measures_of

FORMAT = 1
TOKENS = 64
"""Tokens of a text that it reads."""
CHARACTERS_PER_TOKEN = 16
"""More than any text has on average: what lies beyond is not cut into tokens."""
BATCH = 8
"""Texts computed at once: on one core more gain nothing, and each is padded to the longest."""
TOKENIZER = "tokenizer"


class Encoder:
    """A `Guesser` over a transformer of few layers."""

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
            fits = whole(arrays, layers, heads, self._clusters)
            self._tokenizer = _tokenizer_of(arrays[TOKENIZER])
        except (KeyError, TypeError, ValueError):
            raise RouterFormatError("the router's encoder is incomplete or damaged") from None
        if not fits or self._tokenizer.get_vocab_size() > len(arrays[WORDS]):
            raise RouterFormatError("the parts of the router's encoder do not fit each other")
        self._arrays, self._settings = dict(arrays), dict(settings)
        tokens = len(arrays[ENTRY[0]])
        self._characters = tokens * CHARACTERS_PER_TOKEN
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(tokens)
        computed = {name: array for name, array in arrays.items() if name != TOKENIZER}
        self._session = session_of(computed, layers, heads)

    def guess(self, text: str) -> Guess:
        """Guess one text, of any length and any script."""
        return self.guess_many((text,))[0]

    def guess_many(self, texts: Sequence[str]) -> list[Guess]:
        """Guess texts, in the order given, each as `guess` does but for rounding."""
        if not texts:
            return []
        # Lone surrogates are letters that no tokenizer takes.
        readable = [
            text[: self._characters].encode("utf-8", "replace").decode("utf-8") for text in texts
        ]
        # Not the batch's own method, which starts threads.
        ids = [self._tokenizer.encode(text).ids for text in readable]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        logits_NK = np.empty((len(ids), self._clusters), dtype=np.float32)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            logits_NK[places] = self._logits([ids[place] for place in places])
        values_NT, best_NT = best_logits(logits_NK)
        lengths = np.array([max(1, len(tokens)) for tokens in ids], dtype=np.int64)
        measures = measures_of(logits_NK, values_NT, np.zeros(len(ids), dtype=np.float32), lengths)
        return guesses_of(values_NT, best_NT, confidence_of(measures, UNFITTED))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What was learned, to be saved as tensors."""
        return dict(self._arrays)

    def settings(self) -> dict[str, Any]:
        """What the arrays have to agree with, to be saved as JSON."""
        return dict(self._settings)

    def _logits(self, ids: Sequence[Sequence[int]]) -> Floats:
        """Of texts, given as tokens: shape (B, K)."""
        longest = max(1, *map(len, ids)) if len(ids) > 1 else max(1, len(ids[0]))
        ids_BT = np.zeros((len(ids), longest), dtype=np.int64)
        mask_BT = np.zeros((len(ids), longest), dtype=np.int32)
        for row, tokens in enumerate(ids):
            ids_BT[row, : len(tokens)] = tokens
            mask_BT[row, : max(1, len(tokens))] = 1
        given = {"ids": ids_BT, "mask": mask_BT, "places": np.arange(longest)}
        logits_BK: Floats
        (logits_BK,) = self._session.run(None, given)
        return logits_BK


def _tokenizer_of(content: npt.NDArray[Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content.astype(np.uint8).tobytes().decode())
    except Exception as error:  # the library raises what it pleases
        raise RouterFormatError("the tokenizer of the router's encoder is damaged") from error
