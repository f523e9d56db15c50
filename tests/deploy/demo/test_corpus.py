import json
from pathlib import Path

import pytest

from deploy.demo.corpus import LONGEST, SHORTEST, CorpusError, build_corpus

PACKAGES = ("networkx", "PIL")
SPLITS = ("train", "valid", "test")


def rows(directory: Path) -> dict[str, list[dict[str, str]]]:
    return {
        split: [json.loads(line) for line in (directory / f"{split}.jsonl").open()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "corpus"
    build_corpus(directory, seed=1, packages=PACKAGES)
    return directory


def test_every_document_is_real_text_of_a_package_and_in_one_split(built: Path) -> None:
    splits = rows(built)
    assert all(splits.values())
    texts = [row["text"] for split in splits.values() for row in split]
    assert len(texts) == len(set(texts)) > 500
    assert all(SHORTEST <= len(text) <= LONGEST for text in texts)
    assert {row["id"].split(".")[0] for row in splits["train"]} == set(PACKAGES)


def test_no_row_carries_a_label(built: Path) -> None:
    assert all(set(row) == {"id", "text"} for split in rows(built).values() for row in split)


def test_most_documents_are_for_training(built: Path) -> None:
    counts = {split: len(content) for split, content in rows(built).items()}
    total = sum(counts.values())
    assert counts["train"] / total == pytest.approx(0.91, abs=0.04)
    assert counts["valid"] / total == pytest.approx(0.05, abs=0.03)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    built: Path, tmp_path: Path
) -> None:
    build_corpus(tmp_path / "again", seed=1, packages=PACKAGES)
    build_corpus(tmp_path / "other", seed=2, packages=PACKAGES)
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (built / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert (built / "test.jsonl").read_bytes() != (tmp_path / "other" / "test.jsonl").read_bytes()


def test_a_package_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    summary = build_corpus(tmp_path / "c", seed=1, packages=("no_such_package", "PIL"))
    assert list(summary.packages) == ["PIL"]


def test_no_package_at_all_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no_such_package"):
        build_corpus(tmp_path / "c", seed=1, packages=("no_such_package",))
    assert list(tmp_path.iterdir()) == []
