"""Texts as tokens through ONNX Runtime on one thread: what the embedder and the encoder share.

Knows nothing of what a graph computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from router.embedder import CHARACTERS_PER_TOKEN, readable_text

Ids = Sequence[Sequence[int]]

FUSED = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

BATCH_TOKENS = 64
"""Computed at once: that spares a core a tenth of its time for short texts, a third in 32 bits.
Many more leave its caches, and each text is padded to the longest."""

SLOWER = ["SkipLayerNormFusion"]
"""Of what ONNX Runtime does to a graph. That operator takes 21 microseconds for 11 tokens of 384
dimensions where its parts take 6, as they alone use the processor's vectors."""


def session_of(graph: Path | bytes) -> Any:
    """What computes a graph, by its file or its bytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOWER
    )


def tokens_of(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """The tokens of each text, by a tokenizer that cuts at `max_tokens`."""
    characters = max_tokens * CHARACTERS_PER_TOKEN
    # Not the batch's own method, which starts threads.
    return [tokenizer.encode(readable_text(text, characters)).ids for text in texts]


def padded(ids: Ids) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens and which of them are a text's, both of shape (texts, tokens of the longest)."""
    shape = len(ids), max(1, *map(len, ids))
    ids_BT, mask_BT = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, tokens in enumerate(ids):
        ids_BT[row, : len(tokens)] = tokens
        mask_BT[row, : len(tokens)] = 1
    return ids_BT, mask_BT


def in_batches(
    ids: Ids,
    width: int,
    run: Callable[[Ids], npt.NDArray[np.float32]],
) -> npt.NDArray[np.float32]:
    """What `run` makes of texts, some of like length at a time: shape (texts, width), in their
    order."""
    if len(ids) == 1:
        return run(ids)
    found = np.empty((len(ids), width), dtype=np.float32)
    batches: list[list[int]] = []
    for place in sorted(range(len(ids)), key=lambda place: len(ids[place])):
        if not batches or len(ids[place]) * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(place)
    for places in batches:
        found[places] = run([ids[place] for place in places])
    return found
