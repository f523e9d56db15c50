from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.schema import RunConfig
from expert_trainer import embedding
from expert_trainer.embedding import (
    UNRENDERED,
    Embedded,
    embed,
    load_embedder_for,
    plan_blocks,
    wants_ray,
)
from expert_trainer.errors import PoolError
from expert_trainer.runtime import ray_session
from expert_trainer.spool import Spool, SpoolWriter
from expert_trainer.types import Document
from router.types import ignore
from tests.expert_trainer.conftest import TOPICS, sentences

UNANSWERED = ({"role": "user", "content": "Hello"},)
REFUSED = "no token to predict"


@pytest.fixture
def config(make_config: Callable[..., RunConfig], static_embedder: str) -> RunConfig:
    config = make_config()
    router = config.router.model_copy(update={"embedder": static_embedder, "device": "cpu"})
    return config.model_copy(update={"router": router})


def spool(directory: Path, *documents: Document) -> Spool:
    texts = [text for topic in TOPICS for text in sentences(topic, 20, 0)]
    with SpoolWriter(directory / "spool") as writer:
        writer.extend(Document(id=str(i), text=text) for i, text in enumerate(texts))
        writer.extend(documents)
    return writer.spool


def run(documents: Spool, config: RunConfig, directory: Path) -> Embedded:
    directory.mkdir()
    return embed(
        documents,
        np.arange(len(documents))[::-1],
        config,
        directory,
        embedder=load_embedder_for(1, config.router),
        on_progress=ignore,
    )


def test_every_document_has_its_vector_and_its_tokens(config: RunConfig, tmp_path: Path) -> None:
    documents = spool(tmp_path)
    told: list[tuple[str, int, int]] = []
    numbers = np.arange(5, 50)
    embedder = load_embedder_for(45, config.router)
    found = embed(
        documents,
        numbers,
        config,
        tmp_path,
        embedder=embedder,
        on_progress=lambda *step: told.append(step),
    )
    texts = [document.text for document in documents.documents(numbers)]
    np.testing.assert_array_equal(found.vectors, embedder.encode(texts))
    assert (found.tokens > 12).all()
    assert told == [("embedding", 0, 45), ("embedding", 45, 45)]


def test_blocks_are_cut_by_the_documents_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = spool(tmp_path, Document(id="long", text="x" * 5000), Document(id="s", text="y"))
    monkeypatch.setattr(embedding, "BLOCK_DOCUMENTS", 25)
    monkeypatch.setattr(embedding, "BLOCK_BYTES", 4000)
    numbers = np.arange(len(documents))
    blocks = plan_blocks(documents, numbers)
    assert [begin for begin, _ in blocks] == [0, *(end for _, end in blocks[:-1])]
    assert blocks[-1][1] == len(documents)
    sizes = np.diff(documents.offsets)
    for begin, end in blocks:
        assert end - begin <= 25
        assert sizes[begin:end].sum() <= 4000 or end - begin == 1
    assert (60, 61) in blocks, "what is larger than a block is one"
    assert plan_blocks(documents, numbers[:0]) == []


def test_what_cannot_be_rendered_is_left_out(config: RunConfig, tmp_path: Path) -> None:
    bad = Document(id="bad", messages=UNANSWERED)
    with SpoolWriter(tmp_path / "spool") as writer:
        writer.extend([bad, Document(id="a", text="boat"), bad, Document(id="b", text="sail")])
    found = run(writer.spool, config, tmp_path / "run")
    assert found.tokens.tolist()[1::2] == [UNRENDERED] * 2
    assert found.faults == {1: REFUSED, 3: REFUSED}
    expected = found.vectors[[0, 2]].copy()
    kept = found.compact()
    np.testing.assert_array_equal(kept.vectors, expected)
    assert kept.tokens.tolist() == [count for count in found.tokens.tolist() if count > 0]
    assert kept.compact() is kept


def test_ray_is_for_many_documents_or_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not wants_ray(embedding.RAY_FROM_DOCUMENTS - 1)
    assert wants_ray(embedding.RAY_FROM_DOCUMENTS)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert wants_ray(1)


def test_ray_makes_the_same_vectors(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of eight over two actors; the order in which they come back must not matter."""
    from ray.data._internal.block_batching.util import WaitBlockPrefetcher

    held: list[object] = []
    monkeypatch.setattr(WaitBlockPrefetcher, "prefetch_blocks", lambda _, some: held.append(some))
    monkeypatch.setattr(embedding, "BLOCK_DOCUMENTS", 8)
    bad = Document(id="bad", messages=UNANSWERED)
    documents = spool(tmp_path, bad, Document(id="x", text="last"))
    here = run(documents, config, tmp_path / "here")
    with ray_session(cpus=2):
        there = run(documents, config, tmp_path / "there")
        np.testing.assert_array_equal(there.vectors, here.vectors)
        np.testing.assert_array_equal(there.tokens, here.tokens)
        assert there.faults == here.faults == {1: REFUSED}

        base = config.base.model_copy(update={"model": str(tmp_path)})
        with pytest.raises(PoolError, match=r"base\.model .*config\.json is missing"):
            run(documents, config.model_copy(update={"base": base}), tmp_path / "nowhere")
    assert not held, "a thread that lets blocks go after Ray's end takes the process along"
