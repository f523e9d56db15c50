import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import DataConfig
from expert_trainer.errors import CorpusError
from expert_trainer.gathering import Gathered, gather
from expert_trainer.spool import Numbers
from router.types import ignore
from tests.expert_trainer.conftest import sentences

Gather = Callable[..., Gathered]


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"word {i}"} for i in range(count)]


@pytest.fixture
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Gather:
    def run(train: str, seed: int = 1, **settings: Any) -> Gathered:
        config = DataConfig.model_validate({"train": [train]} | settings)
        return gather(config, seed, tmp_path_factory.mktemp("spool"), ignore)

    return run


def said(found: Gathered, numbers: Numbers) -> list[str]:
    return [document.text for document in found.spool.documents(numbers)]


def test_too_many_bad_rows_stop_the_run(tmp_path: Path, gathered: Gather) -> None:
    path = write(tmp_path / "a.jsonl", *texts(98), "{", "{")
    with pytest.raises(CorpusError, match=r"2 of 100 rows") as caught:
        gathered(path)
    assert f"{path}:99: not JSON" in str(caught.value)
    assert gathered(path, max_bad_share=0.02).report.bad == 2


def test_copies_go_and_held_out_ones_stay(tmp_path: Path, gathered: Gather) -> None:
    train = write(
        tmp_path / "train.jsonl",
        {"text": "alpha beta"},
        {"text": "alpha   beta\n", "id": "again"},
        {"text": "in valid"},
        {"text": "in test"},
        {"text": "ﬁne"},
        {"text": "fine"},
    )
    valid = write(tmp_path / "valid.jsonl", {"text": "in valid"}, {"text": "in test"})
    test = write(tmp_path / "test.jsonl", {"text": "in  test"})
    found = gathered(train, valid=[valid], test=[test])
    assert said(found, found.train) == ["alpha beta", "ﬁne"]
    assert said(found, found.heldout) == ["in valid"]
    assert said(found, found.test) == ["in  test"]
    assert (found.report.duplicates, found.report.near_duplicates) == (5, 0)


def test_nothing_near_to_what_is_held_out_is_trained_on(tmp_path: Path, gathered: Gather) -> None:
    """One long text in four versions, each a few words off; and another."""
    original, other = " ".join(sentences("sea", 8, 3)), " ".join(sentences("code", 8, 3))
    train = write(
        tmp_path / "train.jsonl", {"text": f"{original} one"}, {"text": other}, {"text": original}
    )
    valid = write(tmp_path / "valid.jsonl", {"text": f"two {original}"})
    test = write(tmp_path / "test.jsonl", {"text": original.upper().replace(" ", ", ")})
    found = gathered(train, valid=[valid], test=[test])
    assert said(found, found.train) == [other]
    assert said(found, found.heldout) == []
    assert len(found.test) == 1
    assert (found.report.duplicates, found.report.near_duplicates) == (0, 3)
    exact = gathered(train, valid=[valid], test=[test], near_duplicate=None)
    assert [len(part) for part in (exact.test, exact.heldout, exact.train)] == [1, 1, 3]
    assert exact.report.near_duplicates == 0


def test_near_copies_go_before_the_split(tmp_path: Path, gathered: Gather) -> None:
    originals = [" ".join(sentences("sea", 3, seed)) for seed in range(120)]
    rows = [{"text": text} for text in originals]
    copies = [{"text": f"{text} indeed"} for text in originals]
    found = gathered(write(tmp_path / "a.jsonl", *rows, *copies), valid_share=0.3)
    assert len(found.heldout) > 15
    kept = [*said(found, found.train), *said(found, found.heldout)]
    assert sorted(kept) == sorted(originals)
    assert found.report.near_duplicates == 120


def test_the_split_is_by_content_and_seed(tmp_path: Path, gathered: Gather) -> None:
    rows = texts(400)
    one = gathered(write(tmp_path / "a.jsonl", *rows), valid_share=0.1)
    two = gathered(write(tmp_path / "b.jsonl", *reversed(rows)), valid_share=0.1)
    held = set(said(one, one.heldout))
    assert held == set(said(two, two.heldout))
    assert 20 < len(held) < 60
    assert not held & set(said(one, one.train))
    three = gathered(write(tmp_path / "a.jsonl", *rows), seed=2, valid_share=0.1)
    assert held != set(said(three, three.heldout))


def test_no_document_is_an_error(tmp_path: Path, gathered: Gather) -> None:
    with pytest.raises(CorpusError, match="no document to train on"):
        gathered(write(tmp_path / "a.jsonl", ""))
