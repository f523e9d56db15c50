import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expert_trainer.errors import CorpusError
from expert_trainer.sources import content_key, files_of, most_rows, read_rows

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
SHAPES = [
    {"id": "one", "text": "plain"},
    {"messages": CHAT},
    {"prompt": "2+2?", "completion": "4"},
]
FIELDS = ("id", "text", "messages", "prompt", "completion")


def jsonl(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_of(source: str) -> list[Any]:
    return [row.fields for file in files_of(source) for row in read_rows(file, FIELDS)]


@pytest.fixture
def store() -> Any:
    """An object store in memory, behind a URL."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)


def compressed(ending: str, content: bytes) -> bytes:
    if ending == ".jsonl.gz":
        return gzip.compress(content)
    if ending == ".jsonl.zst":
        return bytes(pa.Codec("zstd").compress(content, asbytes=True))
    return content


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_all_shapes_from_every_kind_of_lines(tmp_path: Path, store: Any, ending: str) -> None:
    content = compressed(ending, jsonl(*SHAPES))
    (tmp_path / f"a{ending}").write_bytes(content)
    store.pipe_file(f"/corpus/a{ending}", content)
    assert rows_of(str(tmp_path / f"a{ending}")) == SHAPES
    assert rows_of(f"memory://corpus/*{ending}") == SHAPES


def test_all_shapes_from_parquet(tmp_path: Path, store: Any) -> None:
    pq.write_table(pa.Table.from_pylist(SHAPES, _schema()), tmp_path / "a.parquet")
    store.pipe_file("/corpus/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert rows_of(str(tmp_path / "a.parquet")) == SHAPES
    assert rows_of("memory://corpus/a.parquet") == SHAPES


def test_all_shapes_from_a_hub_data_set(tmp_path: Path) -> None:
    """A data set's repository in a directory is read as one on the hub is."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(SHAPES, _schema()), tmp_path / "set" / "data" / "train-0.parquet"
    )
    pq.write_table(
        pa.Table.from_pylist(SHAPES[:1]), tmp_path / "set" / "data" / "validation-0.parquet"
    )
    assert rows_of(f"hub:{tmp_path / 'set'}") == SHAPES
    assert rows_of(f"hub:{tmp_path / 'set'}:validation") == SHAPES[:1]
    with pytest.raises(CorpusError, match=r"hub:.*nowhere"):
        rows_of(f"hub:{tmp_path}/nowhere")


def _schema() -> pa.Schema:
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    texts = [(name, pa.string()) for name in ("id", "text", "prompt", "completion")]
    return pa.schema([*texts, ("messages", pa.list_(turn))])


def test_rows_are_named_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n')
    assert [row.where for row in read_rows(str(path), FIELDS)] == [f"{path}:1", f"{path}:3"]


def test_globs_and_their_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": "second"}))
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "first"}))
    assert rows_of(f"{tmp_path}/*.jsonl") == [{"text": "first"}, {"text": "second"}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.jsonl", "no such file"),
        ("notes.txt", r"only \.jsonl"),
        ("memory://nowhere/*.jsonl", "no such file"),
        ("nothing://x/a.jsonl", "install the fsspec driver"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CorpusError, match=message):
        files_of(source if "://" in source else str(tmp_path / source))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_damaged_file_says_so(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"not what it says")
    with pytest.raises(CorpusError, match=r"a\..*cannot be read"):
        rows_of(str(path))


def test_a_key_changes_with_the_content(tmp_path: Path, store: Any) -> None:
    path = tmp_path / "a.jsonl"
    keys = []
    for text in ("one", "two", "two"):
        path.write_bytes(jsonl({"text": text}))
        keys.append(content_key(str(path)))
    assert keys[0] != keys[1] == keys[2]
    store.pipe_file("/corpus/a.jsonl", b"{}")
    first = content_key("memory://corpus/a.jsonl")
    assert first == content_key("memory://corpus/a.jsonl")
    store.pipe_file("/corpus/a.jsonl", b"{} ")
    assert first != content_key("memory://corpus/a.jsonl")
    assert content_key("hub:name") == "hub:name"


def test_no_file_has_more_rows_than_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":"a"}\n' * 40)
    assert 40 <= most_rows(str(path)) < 42
    assert most_rows("hub:name") == float("inf")
