import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from expert_trainer.clusters import SHARDS_DIR
from expert_trainer.errors import CorpusError, NotFittedError
from expert_trainer.fitting import FitSummary, fit, read_fit
from expert_trainer.growth import Growth, add_documents
from expert_trainer.storage import Storage
from tests.expert_trainer.conftest import TOPICS, sentences, write_jsonl


@pytest.fixture
def fitted(make_config: Callable[..., RunConfig], static_embedder: str) -> RunConfig:
    """A fitted run whose experts are trained again after a growth of a tenth."""
    config = make_config(retrain_growth=0.1)
    router = config.router.model_copy(update={"embedder": static_embedder})
    config = config.model_copy(update={"router": router})
    fit(config)
    return config


def rows(topic: str, count: int, seed: int) -> list[dict[str, Any]]:
    texts = sentences(topic, count, seed)
    return [{"id": f"new-{topic}-{i}", "text": text} for i, text in enumerate(texts)]


def add(config: RunConfig, path: Path, *new: dict[str, Any]) -> Growth:
    return add_documents(config, [str(write_jsonl(path / "new.jsonl", list(new)))])


def shards(config: RunConfig) -> dict[str, bytes]:
    work = Storage(config.bundle.work)
    return {name: work.read(f"{SHARDS_DIR}/{name}") for name in work.names(SHARDS_DIR)}


def ids(config: RunConfig, summary: FitSummary, cluster: int) -> list[str]:
    shard = summary.shard(Storage(config.bundle.work), summary.clusters[cluster])
    return [document.id for document in shard.documents()]


def cluster_of(config: RunConfig, topic: str) -> int:
    summary = read_fit(config)
    return next(
        cluster.cluster
        for cluster in summary.clusters
        if ids(config, summary, cluster.cluster)[0].split("-")[1] == topic
    )


def test_few_new_documents_wait_and_enough_of_them_grow_a_cluster(
    fitted: RunConfig, tmp_path: Path
) -> None:
    before, files = read_fit(fitted), shards(fitted)
    sea = cluster_of(fitted, "sea")
    growth = add(fitted, tmp_path, *rows("sea", 2, 9))
    (waiting,) = growth.clusters
    assert (waiting.cluster, waiting.documents, waiting.grew) == (sea, 2, False)
    assert waiting.pending_tokens == waiting.tokens > 0
    assert growth.fit == read_fit(fitted) == before, "what waits is no part of the fit"
    assert {name: shards(fitted)[name] for name in files} == files

    growth = add(fitted, tmp_path, *rows("sea", 5, 10))
    (grown,) = growth.clusters
    assert (grown.cluster, grown.documents, grown.pending_tokens, grown.grew) == (sea, 5, 0, True)
    after = read_fit(fitted)
    assert after == growth.fit
    assert after.digest == before.digest
    assert after.documents == before.documents + 7
    assert after.tokens == before.tokens + waiting.tokens + grown.tokens
    assert sum(cluster.mass for cluster in after.clusters) == pytest.approx(1)
    for old, new in zip(before.clusters, after.clusters, strict=True):
        assert new.mass == new.tokens / after.tokens
        assert (new.shard_sha256 != old.shard_sha256) == (new.cluster == sea)
    assert ids(fitted, after, sea)[:30] == ids_before(fitted, files, before, sea)
    assert ids(fitted, after, sea)[30:] == [
        "new-sea-0",
        "new-sea-1",
        *(f"new-sea-{i}" for i in range(5)),
    ]
    left = shards(fitted).keys()
    assert not [name for name in left if name.startswith("added-")]
    assert len(left) == len(files), "the old shard is gone"


def ids_before(
    config: RunConfig, files: dict[str, bytes], summary: FitSummary, cluster: int
) -> list[str]:
    content = files[summary.clusters[cluster].shard_file]
    return [json.loads(line)["id"] for line in content.splitlines()]


def test_the_same_file_again_adds_nothing(fitted: RunConfig, tmp_path: Path) -> None:
    new = [*rows("sea", 2, 9), *rows("code", 8, 9)]
    first = add(fitted, tmp_path, *new)
    assert sorted((growth.documents, growth.grew) for growth in first.clusters) == [
        (2, False),
        (8, True),
    ]
    files = shards(fitted)
    again = add(fitted, tmp_path, *new)
    assert [(growth.documents, growth.grew) for growth in again.clusters] == [(0, False)]
    assert again.clusters[0].pending_tokens > 0
    assert again.report.duplicates == 10
    assert shards(fitted) == files
    assert again.fit == first.fit


def test_copies_of_what_is_there_are_left_out(fitted: RunConfig, tmp_path: Path) -> None:
    sources = {name: getattr(fitted.data, name)[0] for name in ("train", "valid", "test")}
    known = {
        name: json.loads(Path(source).read_text().splitlines()[0])["text"]
        for name, source in sources.items()
    }
    long = " ".join(sentences("sea", 12, 77))
    near = long.replace("the", "the", 1).upper() + " indeed"
    growth = add(
        fitted,
        tmp_path,
        *({"text": f"  {text}"} for text in known.values()),
        {"text": long},
        {"text": near},
    )
    assert sum(cluster.documents for cluster in growth.clusters) == 1
    assert (growth.report.duplicates, growth.report.near_duplicates) == (3, 1)


def test_nothing_new_changes_nothing(fitted: RunConfig, tmp_path: Path) -> None:
    files = shards(fitted)
    growth = add_documents(fitted, fitted.data.valid)
    assert (growth.clusters, growth.report.duplicates) == ((), 24)
    assert shards(fitted) == files


def test_bad_rows_stop_before_anything_is_added(fitted: RunConfig, tmp_path: Path) -> None:
    files = shards(fitted)
    new = rows("sea", 20, 9)
    with pytest.raises(CorpusError, match=r"(?s)1 of 21 rows.*new\.jsonl:21"):
        add(fitted, tmp_path, *new, {"text": 5})
    assert shards(fitted) == files


def test_an_unfitted_run_has_nothing_to_add_to(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(NotFittedError):
        add(make_config(), tmp_path, *rows("sea", 1, 9))


class PowerCutError(Exception):
    pass


def state(config: RunConfig) -> tuple[FitSummary, dict[int, list[str]]]:
    """The fit and all documents of each cluster, those that wait included."""
    summary = read_fit(config)
    return summary, {
        cluster.cluster: ids(config, summary, cluster.cluster) for cluster in summary.clusters
    }


def test_whoever_is_interrupted_loses_nothing_and_adds_nothing_twice(
    fitted: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = [row for topic in TOPICS for row in rows(topic, 6, 9)]
    write, remove = Storage.write, Storage.remove
    steps = 0
    fail_at = 10**9

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps > fail_at:
            raise PowerCutError

    def counted_write(self: Storage, name: str, content: bytes) -> None:
        count()
        write(self, name, content)

    def counted_remove(self: Storage, name: str) -> None:
        count()
        remove(self, name)

    work = Path(fitted.bundle.work)
    shutil.copytree(work, tmp_path / "start")
    monkeypatch.setattr(Storage, "write", counted_write)
    monkeypatch.setattr(Storage, "remove", counted_remove)
    add(fitted, tmp_path, *new)
    expected, files, total = state(fitted), shards(fitted), steps
    assert total == 13, "three clusters: waiting, merged, two files to go; and fit.json"
    for interrupted in range(total):
        shutil.rmtree(work)
        shutil.copytree(tmp_path / "start", work)
        steps, fail_at = 0, interrupted
        with pytest.raises(PowerCutError):
            add(fitted, tmp_path, *new)
        state(fitted)  # every shard that is named can be read and is whole
        fail_at = 10**9
        add(fitted, tmp_path, *new)
        assert state(fitted) == expected
        assert shards(fitted) == files
