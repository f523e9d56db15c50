from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_trainer.errors import ExpertError
from expert_trainer.shards import Shard, Sorter, write_shard
from expert_trainer.storage import Storage
from expert_trainer.types import Document

DOCUMENTS = [Document(id="a", text="one"), Document(id="b", prompt="two", text="three")]


@pytest.fixture(params=["path", "url"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(tmp_path if request.param == "path" else f"memory://shards/{tmp_path.name}")


def test_documents_read_back(storage: Storage) -> None:
    shard = write_shard(storage, "some.jsonl", DOCUMENTS)
    assert list(shard.documents()) == DOCUMENTS
    assert list(write_shard(storage, "none.jsonl", []).documents()) == []


def test_a_shard_that_is_gone_or_changed_is_refused(storage: Storage) -> None:
    shard = write_shard(storage, "some.jsonl", DOCUMENTS)
    with pytest.raises(ExpertError, match=r"missing.*introvert fit"):
        Shard(storage, "other.jsonl", shard.sha256).read()
    storage.write("some.jsonl", b"{}\n")
    with pytest.raises(ExpertError, match="changed after the fit"):
        shard.documents()


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 99))), st.integers(1, 200))
def test_rows_end_in_their_files_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], buffer: int
) -> None:
    directory = tmp_path_factory.mktemp("sorted")
    with Sorter(directory, buffer_bytes=buffer) as sorter:
        for name, value in rows:
            sorter.put(name, f"{value}\n".encode())
    found = {path.name: path.read_text().split() for path in directory.iterdir()}
    assert found == {
        name: [str(value) for other, value in rows if other == name] for name, _ in rows
    }


def test_a_file_for_each_of_thousands_without_keeping_any_open(tmp_path: Path) -> None:
    with Sorter(tmp_path, buffer_bytes=100_000) as sorter:
        for round_ in range(3):
            for name in range(3000):
                sorter.put(f"{name}", f"{round_} {'x' * 20}\n".encode())
                assert sorter.waiting_bytes <= 100_000
    assert len(list(tmp_path.iterdir())) == 3000
    assert (tmp_path / "2999").read_text().count("\n") == 3
