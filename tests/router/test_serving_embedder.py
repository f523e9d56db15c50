"""The embedder on ONNX Runtime: the same vectors, exported once, torch where that cannot be."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.schema import RouterConfig
from router import serving_embedder as module
from router.embedder import SentenceEmbedder
from router.errors import EmbedderMismatchError, ExportError
from router.onnx_embedder import OnnxEmbedder
from router.onnx_export import GRAPH_FILE, QUANTIZED_FILE
from router.serving_embedder import serving_embedder

NAME = "all-MiniLM-L6-v2"
TEXTS = [
    "How do I merge two tables?",
    "",
    "tribunal",
    "half a pair \ud83d and a whole one 😀",
    "The goalkeeper lost the cup final. " * 60,
    *(f"text number {number} of several" for number in range(12)),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(autouse=True)
def _exports_here(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "exports_directory", lambda: exports)


def load(minilm: SentenceEmbedder, *, quantized: bool = False, **settings: object) -> object:
    config = RouterConfig.model_validate(settings)
    return serving_embedder(
        NAME, minilm.digest, config, device="cpu", threads=1, quantized=quantized
    )


def test_the_vectors_are_those_of_torch(minilm: SentenceEmbedder) -> None:
    embedder = load(minilm)
    assert isinstance(embedder, OnnxEmbedder)
    assert (embedder.name, embedder.digest) == (minilm.name, minilm.digest)
    assert embedder.dimension == minilm.dimension
    vectors = embedder.encode(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, minilm.encode(TEXTS), atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert embedder.encode([]).shape == (0, minilm.dimension)


def test_an_export_is_found_again_without_torch(minilm: SentenceEmbedder, exports: Path) -> None:
    load(minilm)
    script = (
        "import sys, pathlib; from configs.schema import RouterConfig\n"
        "from router import serving_embedder as m\n"
        f"m.exports_directory = lambda: pathlib.Path({str(exports)!r})\n"
        f"e = m.serving_embedder({NAME!r}, {minilm.digest!r}, RouterConfig(), device='cpu', "
        "threads=1)\n"
        "print(type(e).__name__, e.dimension, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["OnnxEmbedder", "384", "False"]


def test_torch_where_it_is_asked_for(minilm: SentenceEmbedder) -> None:
    assert isinstance(load(minilm, runtime="torch"), SentenceEmbedder)


def test_a_model_of_another_digest_is_refused() -> None:
    for runtime in ("auto", "onnx", "torch"):
        config = RouterConfig.model_validate({"runtime": runtime})
        with pytest.raises(EmbedderMismatchError, match="introvert fit"):
            serving_embedder(NAME, "0" * 64, config, device="cpu", threads=1)


def test_what_cannot_be_exported_runs_on_torch_and_says_so(
    minilm: SentenceEmbedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise ExportError("it pools by 'lasttoken'")

    monkeypatch.setattr(module, "exports_directory", lambda: tmp_path)
    monkeypatch.setattr(module, "export_embedder", refuse)
    with caplog.at_level(logging.WARNING):
        assert isinstance(load(minilm), SentenceEmbedder)
    assert "lasttoken" in caplog.text
    with pytest.raises(ExportError, match=r"router\.runtime.*lasttoken.*'auto'"):
        load(minilm, runtime="onnx")


def test_a_damaged_export_is_made_anew(
    minilm: SentenceEmbedder, exports: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(minilm)
    (directory,) = (path for path in exports.iterdir() if path.is_dir() and path.name[0] != ".")
    meta = json.loads((directory / module.META_FILE).read_text())
    assert set(meta["sha256"]) == {GRAPH_FILE, QUANTIZED_FILE, module.TOKENIZER_FILE}
    with (directory / GRAPH_FILE).open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert isinstance(load(minilm), SentenceEmbedder)
    assert "damaged" in caplog.text
    assert isinstance(load(minilm), OnnxEmbedder)


def test_in_8_bits_the_vectors_are_close_and_a_text_s_own(minilm: SentenceEmbedder) -> None:
    embedder = load(minilm, quantized=True)
    assert isinstance(embedder, OnnxEmbedder)
    assert embedder.quantized
    assert not getattr(load(minilm), "quantized", True)
    found, right = embedder.encode(TEXTS), minilm.encode(TEXTS)
    cosines = (found * right).sum(axis=1)
    assert 0.985 < cosines.min() < 0.99999, "in 8 bits, so not the same"
    for text, vector in zip(TEXTS, found, strict=True):
        alone = embedder.encode([text])[0]
        np.testing.assert_allclose(alone, vector, atol=1e-6, err_msg="its company rounds it")


def test_a_model_that_8_bits_do_not_suit_stays_in_32(
    minilm: SentenceEmbedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "exports_directory", lambda: tmp_path)
    monkeypatch.setattr(module, "LEAST_QUANTIZED_COSINE", 1.0)
    embedder = load(minilm, quantized=True)
    assert "stays in 32 bits: its vectors differ" in caplog.text
    assert isinstance(embedder, OnnxEmbedder)
    assert not embedder.quantized
    assert not list(tmp_path.rglob(QUANTIZED_FILE))
