"""The embedder as ONNX Runtime computes it: one thread, no torch.

Knows nothing of how the graph was made or of routers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from router.errors import ExportError
from router.onnx_export import GRAPH_FILE, QUANTIZED_FILE, TOKENIZER_FILE
from router.tokens import Ids, in_batches, padded, session_of, tokens_of


class OnnxEmbedder:
    """An `Embedder` over an exported graph.

    Args:
        directory: holds the graph and the tokenizer.
        name: of the embedder that was exported.
        digest: its digest.
        max_tokens: tokens of a text that are read.
        graph: the file of the graph: that of 32 bits, or QUANTIZED_FILE.

    Raises:
        ExportError: a file is missing or cannot be read.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        digest: str,
        max_tokens: int,
        graph: str = GRAPH_FILE,
    ) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
            self._session: Any = session_of(directory / graph)
        except Exception as error:  # both libraries raise what they please
            raise ExportError(f"the export in {directory} cannot be read ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self.max_tokens = max_tokens
        self.quantized = graph == QUANTIZED_FILE
        self.name = name
        self.digest = digest
        self.dimension = self._run([[0]]).shape[1]

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed texts: shape (N, D), float32, rows of unit length, in the order given."""
        ids = self._tokens(texts)
        return in_batches(ids, self.dimension, self._run)

    def inputs(self, texts: Sequence[str]) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
        """What the graph is given for each of some texts."""
        for ids in self._tokens(texts):
            yield _inputs([ids])

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return tokens_of(self._tokenizer, texts, self.max_tokens)

    def _run(self, ids: Ids) -> npt.NDArray[np.float32]:
        vectors: npt.NDArray[np.float32]
        (vectors,) = self._session.run(None, _inputs(ids))
        return vectors


def _inputs(ids: Ids) -> dict[str, npt.NDArray[np.int64]]:
    ids_BT, mask_BT = padded(ids)
    return {"ids": ids_BT, "mask": mask_BT}
