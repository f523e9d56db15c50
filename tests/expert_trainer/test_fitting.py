import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from expert_trainer import clusters
from expert_trainer.errors import CorpusError, NotFittedError
from expert_trainer.fitting import ensure_fit, fit, heldout_documents, read_fit
from expert_trainer.shards import Shard, Sorter
from expert_trainer.storage import Storage
from router.errors import CalibrationError, ClusteringError
from router.model import Router
from tests.expert_trainer.conftest import TOPICS, sentences


def load(shard: Shard) -> list[dict[str, str]]:
    return [json.loads(line) for line in shard.read().splitlines()]


def with_data(config: RunConfig, **data: object) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def test_a_fit_shares_the_corpus_out(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    stages: list[str] = []
    summary = fit(config, lambda stage, done, total: stages.append(stage))
    work = Storage(config.bundle.work)
    assert list(dict.fromkeys(stages)) == [
        "reading",
        "comparing",
        "embedding",
        "clustering",
        "writing",
    ]
    assert (summary.documents, summary.heldout_documents, summary.rows) == (90, 24, 138)
    assert sum(cluster.mass for cluster in summary.clusters) == pytest.approx(1)
    topics = set()
    for cluster in summary.clusters:
        shard, held = summary.shard(work, cluster), summary.heldout(work, cluster)
        rows = load(shard)
        assert len(rows) == cluster.documents
        assert len(load(held)) == cluster.heldout_documents
        assert all(row.keys() == {"id", "text"} for row in rows), "nothing else is carried along"
        topics |= {row["id"].split("-")[1] for row in rows}
        assert len({row["id"].split("-")[1] for row in rows}) == 1, "the topics are plain to see"
        assert cluster.tokens > cluster.documents
        assert len(cluster.top_terms) == 10
    assert topics == {"sea", "kitchen", "code"}
    router = Router.load(Path(config.bundle.work) / "router")
    first = summary.clusters[0]
    texts = [row["text"] for row in load(summary.shard(work, first))]
    assert set(router.assign(router.embedder.encode(texts)).tolist()) == {first.cluster}


def test_a_fit_is_reused_until_something_changes(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config()
    source = tmp_path / "train.jsonl"
    source.write_bytes(Path(config.data.train[0]).read_bytes())
    config = with_data(config, train=[str(source)])
    with pytest.raises(NotFittedError, match="introvert fit"):
        read_fit(config)
    first = fit(config)
    stages: list[str] = []
    assert ensure_fit(config, lambda stage, *_: stages.append(stage)) == first
    assert stages == [], "nothing is done twice"
    assert read_fit(config.model_copy(update={"experts": make_config(rank=2).experts})) == first
    router = config.router.model_copy(update={"clusters": 2})
    for other in (
        config.model_copy(update={"seed": 6}),
        config.model_copy(update={"router": router}),
    ):
        with pytest.raises(NotFittedError, match="another config"):
            read_fit(other)
    source.write_text(source.read_text() + '{"text": "one more document"}\n')
    assert ensure_fit(config).documents == first.documents + 1


def test_equal_fits_make_equal_shards(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config()
    first = fit(config)
    elsewhere = config.bundle.model_copy(update={"work_dir": str(tmp_path / "elsewhere")})
    assert fit(config.model_copy(update={"bundle": elsewhere})) == first


def test_rows_without_tokens_count_as_bad(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config()
    template = "{{ raise_exception('no chats here') }}"
    base = tmp_path / "base"
    base.mkdir()
    for path in Path(config.base.model).iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "chat_template.jinja").write_text(template)
    chats = tmp_path / "chats.jsonl"
    turn = {"role": "assistant", "content": "hello there"}
    chats.write_text(json.dumps({"messages": [turn]}) + "\n")
    config = with_data(config, train=[*config.data.train, str(chats)])
    config = config.model_copy(update={"base": config.base.model_copy(update={"model": str(base)})})
    summary = fit(config)
    assert summary.bad_rows == 1
    assert summary.faults == [f"{chats}:1: the chat template refuses it: no chats here"]
    with pytest.raises(CorpusError, match="1 of 139 rows"):
        fit(with_data(config, max_bad_share=0.0))


def static(config: RunConfig, embedder: str, **changes: Any) -> RunConfig:
    router = config.router.model_copy(update={"embedder": embedder, "device": "cpu", **changes})
    return config.model_copy(update={"router": router})


def test_a_fit_behind_a_url_is_the_same(
    make_config: Callable[..., RunConfig], static_embedder: str, tmp_path: Path
) -> None:
    config = static(make_config(), static_embedder)
    here = fit(config)
    url = f"memory://fits/{tmp_path.name}"
    scratch = str(tmp_path / "scratch")
    bundle = config.bundle.model_copy(update={"work_dir": url, "scratch_dir": scratch})
    config = config.model_copy(update={"bundle": bundle})
    assert fit(config) == here == read_fit(config)
    assert Storage(url).names() == ["fit.json", "router", "shards"]
    assert not list(Path(scratch).glob(".fit-*"))
    for cluster in here.clusters:
        assert here.shard(Storage(url), cluster).read()


def test_what_to_evaluate_on(
    make_config: Callable[..., RunConfig], static_embedder: str, tmp_path: Path
) -> None:
    config = static(make_config(), static_embedder)
    split, documents = heldout_documents(config, fit(config))
    assert split == "test"
    tests = [json.loads(line) for line in Path(config.data.test[0]).read_text().splitlines()]
    assert [document.id for document in documents] == [row["id"] for row in tests]
    config = with_data(config, test=[])
    split, documents = heldout_documents(config, fit(config))
    assert (split, len(documents)) == ("valid", 24)
    config = with_data(config, valid=[], valid_share=1e-9)
    router = config.router.model_copy(update={"abstain_quantile": 0.0})
    config = config.model_copy(update={"router": router})
    with pytest.raises(CorpusError, match=r"data\.valid"):
        heldout_documents(config, fit(config))


def test_what_must_fail_for_want_of_texts_fails_before_embedding(
    make_config: Callable[..., RunConfig], static_embedder: str
) -> None:
    config = static(make_config(), static_embedder)
    stages: set[str] = set()
    router = config.router.model_copy(update={"clusters": 500})
    with pytest.raises(ClusteringError, match="500 clusters"):
        fit(config.model_copy(update={"router": router}), lambda stage, *_: stages.add(stage))
    with pytest.raises(CalibrationError, match=r"data\.valid"):
        fit(with_data(config, valid=[], valid_share=1e-9), lambda stage, *_: stages.add(stage))
    assert "embedding" not in stages


class PowerCutError(Exception):
    pass


def test_whoever_is_interrupted_leaves_no_fit(
    make_config: Callable[..., RunConfig],
    static_embedder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = static(make_config(), static_embedder)
    expected = fit(config)
    other = config.model_copy(update={"seed": 6})
    steps, fail_at = 0, 10**9

    def counted(name: str) -> None:
        original = getattr(Storage, name)

        def method(*arguments: object, **more: object) -> object:
            nonlocal steps
            steps += 1
            if steps > fail_at:
                raise PowerCutError
            return original(*arguments, **more)

        monkeypatch.setattr(Storage, name, method)

    for name in ("remove", "put_tree", "put_file"):
        counted(name)
    fit(other)
    total = steps
    assert total >= 2 + 1 + 7, "two removed; the router; two shards a cluster and the tests'"
    for interrupted in range(total):
        fail_at = 10**9
        assert fit(config) == expected
        steps, fail_at = 0, interrupted
        with pytest.raises(PowerCutError):
            fit(other)
        for wanted in (other, config) if interrupted > 1 else (other,):
            with pytest.raises(NotFittedError):
                read_fit(wanted)
        assert not list(config.bundle.scratch.glob(".fit-*"))


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_memory_does_not_grow_with_the_corpus(
    make_config: Callable[..., RunConfig],
    static_embedder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 MB of text in 12 MB more than 8 MB of text take, caches and buffers included."""
    monkeypatch.setattr(clusters, "Sorter", partial(Sorter, buffer_bytes=1 << 20))
    # a student learns from a sample of bounded size, larger than all of this
    config = static(make_config(), static_embedder, student=False)
    topics = [text for topic in TOPICS for text in sentences(topic, 200, 1)]
    order = random.Random(0)

    def rows(count: int) -> str:
        source = tmp_path / f"{count}.jsonl"
        with source.open("w") as file:
            for i in range(count):
                text = " ".join(order.choices(topics[i % 3 * 200 : i % 3 * 200 + 200], k=60))
                file.write(json.dumps({"id": str(i), "text": text}) + "\n")
        return str(source)

    def grown(source: str) -> int:
        start = most = anonymous_bytes()

        def sample(*_: object) -> None:
            nonlocal most
            most = max(most, anonymous_bytes())

        summary = fit(with_data(config, train=[source], near_duplicate=0.9), sample)
        assert summary.documents > 100
        return most - start

    grown(rows(1200))
    large = rows(3500)
    size = Path(large).stat().st_size
    assert size > 24 << 20
    assert grown(large) < 12 << 20
