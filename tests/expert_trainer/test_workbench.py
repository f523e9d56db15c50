"""The workbench: documents from any thread, time that is added up."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.schema import RunConfig
from expert_trainer.errors import ExpertError
from expert_trainer.shards import Shard, write_shard
from expert_trainer.storage import Storage
from expert_trainer.types import Document
from expert_trainer.workbench import Stopwatch, Workbench


def test_threads_take_turns_with_the_tokenizer(
    make_config: Callable[..., RunConfig], corpus_dir: Path, tmp_path: Path
) -> None:
    bench = Workbench(make_config())
    rows = [json.loads(line) for line in (corpus_dir / "train.jsonl").read_text().splitlines()]
    documents = [Document(row["id"], row["text"]) for row in rows]
    shard = write_shard(Storage(tmp_path), "shard.jsonl", documents)
    alone = bench.examples((shard,))
    assert len(alone) == len(documents)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: bench.examples((shard,)), range(8)):
            assert found == alone


def test_a_shard_that_was_changed(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    bench = Workbench(make_config())
    shard = write_shard(Storage(tmp_path), "shard.jsonl", [Document("a", "some text")])
    with pytest.raises(ExpertError, match="changed after the fit"):
        bench.examples((Shard(shard.directory, shard.name, "0" * 64),))


def test_the_fingerprint_is_the_active_slots(make_config: Callable[..., RunConfig]) -> None:
    bench = Workbench(make_config())
    plain = bench.fingerprint()
    bench.adapter.reset(0, 1)
    bench.adapter.set_state(0, bench.adapter.state(0) + 0.1)
    assert bench.fingerprint() == plain
    with bench.adapter.using([0]):
        assert bench.fingerprint() != plain
    assert bench.computing.seconds > 0


def test_a_stopwatch_counts_nested_time_once() -> None:
    watch = Stopwatch()
    begin = time.perf_counter()
    with watch:
        time.sleep(0.02)
        with watch:
            time.sleep(0.02)
    once = watch.seconds
    assert 0.04 <= once <= time.perf_counter() - begin
    with pytest.raises(RuntimeError), watch:
        raise RuntimeError
    with watch:
        time.sleep(0.01)
    assert watch.seconds >= once + 0.01
