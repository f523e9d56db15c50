"""The embedder as ONNX Runtime computes it: one thread, no torch.

Knows nothing of how the graph was made or of routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from router.errors import ExportError
from router.onnx_export import GRAPH_FILE, TOKENIZER_FILE
from router.tokens import in_batches, padded, session_of, tokens_of


class OnnxEmbedder:
    """An `Embedder` over an exported graph.

    Args:
        directory: holds the graph and the tokenizer.
        name: of the embedder that was exported.
        digest: its digest.
        max_tokens: tokens of a text that are read.

    Raises:
        ExportError: a file is missing or cannot be read.
    """

    def __init__(self, directory: Path, *, name: str, digest: str, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
            self._session: Any = session_of(directory / GRAPH_FILE)
        except Exception as error:  # both libraries raise what they please
            raise ExportError(f"the export in {directory} cannot be read ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self._max_tokens = max_tokens
        self.name = name
        self.digest = digest
        self.dimension = self._run([[0]]).shape[1]

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed texts: shape (N, D), float32, rows of unit length, in the order given."""
        ids = tokens_of(self._tokenizer, texts, self._max_tokens)
        return in_batches(ids, self.dimension, self._run)

    def _run(self, ids: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        ids_BT, mask_BT = padded(ids)
        vectors: npt.NDArray[np.float32]
        (vectors,) = self._session.run(None, {"ids": ids_BT, "mask": mask_BT})
        return vectors
