"""The embedder to serve with: exported to ONNX once per machine, else torch's, with the reason.

An export is kept in the user's cache under the digest of the embedder that it was made of, and was
compared with it before it got that name; so whoever finds it there needs neither torch nor the
model. Several processes that start at once make it once. Beside the graph of 32 bits there is one
that computes in 8, for routers that know which of its decisions are too close.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import numpy.typing as npt

from configs.schema import RouterConfig
from router.embedder import Embedder, SentenceEmbedder, load_embedder
from router.errors import EmbedderMismatchError, ExportError
from router.onnx_embedder import OnnxEmbedder
from router.onnx_export import GRAPH_FILE, QUANTIZED_FILE, TOKENIZER_FILE, export_embedder
from router.quantization import ROUNDING, SAMPLES, levels_here, quantize

Vectors = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)

FORMAT = 4
META_FILE = "export.json"
LEAST_COSINE = 0.9995
"""Of an exported and the original vector; both compute in 32 bits."""
LEAST_QUANTIZED_COSINE = 0.98
"""Of a vector in 8 bits and the original; what it does to routes is measured for each router."""
PROBES = (
    "How do I reverse a list in Python?",
    "The court dismissed the appeal on procedural grounds.",
    "Simmer the onions in butter until they are soft and golden. " * 40,
    "weather",
    "",
)


def exports_directory() -> Path:
    """Where exports are kept on this machine."""
    return Path.home() / ".cache" / "introvert" / "embedders"


def serving_embedder(
    name: str,
    digest: str,
    config: RouterConfig,
    *,
    device: str,
    threads: int | None,
    quantized: bool = False,
) -> Embedder:
    """The embedder of a router, as fast as this machine can.

    Args:
        name: of the embedding model.
        digest: of the embedder that the router was fitted with.
        config: `runtime` `auto`: ONNX Runtime on a CPU, torch where that cannot be; `onnx` and
            `torch` insist.
        device: of torch's embedder: `cpu`, `cuda` or `auto`.
        threads: bound on torch's threads.
        quantized: in 8 bits, where ONNX Runtime computes it and that graph could be made.

    Raises:
        EmbedderNotFoundError: the model cannot be loaded.
        EmbedderMismatchError: the model is another than the router was fitted with.
        ExportError: `runtime` is `onnx` and that cannot be.
    """
    if config.runtime == "torch" or (config.runtime == "auto" and device == "cuda"):
        return _original(name, digest, config, device, threads)
    kind = f"{FORMAT}-{ROUNDING}-{levels_here()}-{version('onnxruntime')}"
    directory = exports_directory() / f"{digest[:32]}-{kind}"
    try:
        if not directory.is_dir():
            with _alone(directory):
                if not directory.is_dir():
                    _export(_original(name, digest, config, "cpu", threads), directory)
        return _exported(directory, name, digest, quantized=quantized)
    except ExportError as error:
        if config.runtime == "onnx":
            raise ExportError(
                f"router.runtime is 'onnx', but embedding model '{name}' cannot be used so: "
                f"{error}; set it to 'auto' or 'torch'"
            ) from error
        logger.warning("embedding model '%s' runs on torch, not on ONNX Runtime: %s", name, error)
    return _original(name, digest, config, device, threads)


def require_digest(embedder: Embedder, digest: str) -> None:
    """Refuse an embedder that is not the one of this digest.

    Raises:
        EmbedderMismatchError: it is not.
    """
    if embedder.digest != digest:
        raise EmbedderMismatchError(
            f"embedding model '{embedder.name}' is not the one that the router "
            f"was fitted with (digest {embedder.digest[:12]}, not {digest[:12]}); install that "
            "model, or run `introvert fit` again"
        )


def _original(
    name: str, digest: str, config: RouterConfig, device: str, threads: int | None
) -> SentenceEmbedder:
    embedder = load_embedder(
        name,
        device=device,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        threads=threads,
    )
    require_digest(embedder, digest)
    return embedder


def _export(embedder: SentenceEmbedder, directory: Path) -> None:
    """Export, compare, and only then give it its name."""
    if embedder.max_tokens is None:
        raise ExportError("it knows no limit of length")
    try:
        temporary = Path(mkdtemp(prefix=".", dir=directory.parent))
    except OSError as error:
        raise ExportError(f"{directory.parent} cannot be written to ({error.strerror})") from None
    try:
        export_embedder(embedder, temporary)
        made = OnnxEmbedder(
            temporary, name=embedder.name, digest=embedder.digest, max_tokens=embedder.max_tokens
        )
        original = embedder.encode(PROBES)
        cosine = float((made.encode(PROBES) * original).sum(axis=1).min())
        if not cosine >= LEAST_COSINE:
            raise ExportError(
                f"its exported vectors differ from the original ones (cosine {cosine:.4f})"
            )
        try:
            _quantize(made, temporary, original)
        except ExportError as error:
            (temporary / QUANTIZED_FILE).unlink(missing_ok=True)
            logger.warning("embedding model '%s' stays in 32 bits: %s", embedder.name, error)
        meta = {
            "max_tokens": embedder.max_tokens,
            "sha256": {path.name: _hash(path) for path in sorted(temporary.iterdir())},
        }
        (temporary / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
        temporary.rename(directory)
    except OSError as error:
        raise ExportError(f"{directory} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("embedding model '%s' exported to %s", embedder.name, directory)


def _quantize(exported: OnnxEmbedder, directory: Path, original: Vectors) -> None:
    """Write the graph in 8 bits beside the other.

    Raises:
        ExportError: it cannot be made, or its vectors are far off.
    """
    import onnx

    try:
        graph = quantize(onnx.load(directory / GRAPH_FILE), exported.inputs(SAMPLES), levels_here())
        (directory / QUANTIZED_FILE).write_bytes(graph.SerializeToString())
        found = OnnxEmbedder(
            directory,
            name=exported.name,
            digest=exported.digest,
            max_tokens=exported.max_tokens,
            graph=QUANTIZED_FILE,
        )
        cosine = float((found.encode(PROBES) * original).sum(axis=1).min())
    except OSError:
        raise
    except Exception as error:  # ONNX and its runtime raise whatever they meet
        raise ExportError(f"it cannot be made ({error})") from error
    if not cosine >= LEAST_QUANTIZED_COSINE:
        raise ExportError(f"its vectors differ from the original ones (cosine {cosine:.4f})")


def _exported(directory: Path, name: str, digest: str, *, quantized: bool) -> OnnxEmbedder:
    """Use an export that is intact; a damaged one goes, so that the next start makes it anew."""
    graph = GRAPH_FILE
    try:
        meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
        hashes = meta["sha256"]
        if quantized and QUANTIZED_FILE in hashes:
            graph = QUANTIZED_FILE
        intact = all(_hash(directory / file) == hashes[file] for file in (graph, TOKENIZER_FILE))
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
        shutil.rmtree(directory, ignore_errors=True)
        raise ExportError(f"its export in {directory} was damaged and has been removed")
    return OnnxEmbedder(
        directory, name=name, digest=digest, max_tokens=int(meta["max_tokens"]), graph=graph
    )


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the lock of one export; several gateway processes start at once."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory.with_name(f".{directory.name}.lock"), os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ExportError(f"{directory.parent} cannot be written to ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _hash(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
