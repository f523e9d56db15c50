"""The embedder as ONNX Runtime computes it: one thread, no torch.

Knows nothing of how the graph was made or of routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from router.embedder import CHARACTERS_PER_TOKEN, readable_text
from router.errors import ExportError
from router.onnx_export import GRAPH_FILE, TOKENIZER_FILE

BATCH_TEXTS = 8
"""Texts embedded at once: on one core more gain nothing, and each is padded to the longest."""


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
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
            self._session: Any = onnxruntime.InferenceSession(
                directory / GRAPH_FILE, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # both libraries raise what they please
            raise ExportError(f"the export in {directory} cannot be read ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self._characters = max_tokens * CHARACTERS_PER_TOKEN
        self.name = name
        self.digest = digest
        self.dimension = self._run([[0]]).shape[1]

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed texts: shape (N, D), float32, rows of unit length, in the order given."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        readable = [readable_text(text, self._characters) for text in texts]
        # Not the batch's own method, which starts threads.
        ids = [self._tokenizer.encode(text).ids for text in readable]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        for start in range(0, len(order), BATCH_TEXTS):
            places = order[start : start + BATCH_TEXTS]
            vectors[places] = self._run([ids[place] for place in places])
        return vectors

    def _run(self, ids: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        longest = max(map(len, ids))
        shape = len(ids), max(1, longest)
        ids_BT, mask_BT = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, tokens in enumerate(ids):
            ids_BT[row, : len(tokens)] = tokens
            mask_BT[row, : len(tokens)] = 1
        vectors: npt.NDArray[np.float32]
        (vectors,) = self._session.run(None, {"ids": ids_BT, "mask": mask_BT})
        return vectors
