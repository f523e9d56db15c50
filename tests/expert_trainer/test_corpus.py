import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import DataConfig
from expert_trainer.corpus import (
    CorpusReport,
    content_hash,
    from_row,
    full_text,
    parse_row,
    read_documents,
    request_of,
    routed_text,
    to_row,
)
from expert_trainer.errors import CorpusError
from expert_trainer.types import Document
from router.conversation import Message

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Bye"},
]


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(train: str | Path, report: CorpusReport | None = None) -> list[Document]:
    config = DataConfig(train=[str(train)])
    return list(read_documents(config.train, config, report or CorpusReport()))


def test_the_three_shapes_of_a_row(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"id": "one", "text": "plain"},
        {"messages": CHAT},
        {"prompt": "2+2?", "completion": "4"},
    )
    plain, chat, pair = read(path)
    assert plain == Document(id="one", text="plain")
    assert chat.messages == tuple(CHAT)
    assert chat.id == f"{path}:2", "a row without an id is named by its place"
    assert (pair.prompt, pair.text) == ("2+2?", "4")


def test_null_fields_are_as_good_as_absent(tmp_path: Path) -> None:
    empty = {"id": None, "text": None, "messages": None, "prompt": None, "completion": None}
    path = write(
        tmp_path / "a.jsonl",
        empty | {"text": "plain"},
        empty | {"messages": CHAT},
        empty | {"prompt": "2+2?", "completion": "4"},
    )
    plain, chat, pair = read(path)
    assert plain == Document(id=f"{path}:1", text="plain")
    assert chat.messages == tuple(CHAT)
    assert (pair.prompt, pair.text) == ("2+2?", "4")
    assert parse_row("f:1", empty, DataConfig(train=["x"])) == "'text' must be text and not empty"


def test_other_fields_are_never_read(tmp_path: Path) -> None:
    config = DataConfig(train=["x"])

    class Trap(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            assert key != "domain"
            return super().get(key, default)

        __getitem__ = get  # type: ignore[assignment]

    document = parse_row("f:1", Trap(id="a", text="hello", domain="sea"), config)
    assert document == Document(id="a", text="hello")
    table = pa.table({"text": ["a", "b"], "domain": ["sea", "sky"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [document.text for document in read(tmp_path / "a.parquet")] == ["a", "b"]
    one = write(tmp_path / "one.jsonl", {"text": "same", "domain": "sea"})
    two = write(tmp_path / "two.jsonl", {"text": "same", "domain": "sky"})
    assert content_hash(read(one)[0]) == content_hash(read(two)[0])


def test_parquet_holds_chats_too(tmp_path: Path) -> None:
    rows = {"messages": [CHAT, [*CHAT[:2], {"role": "assistant", "content": "x", "name": "y"}]]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first.messages == tuple(CHAT), "nulls of other rows' fields are left out"
    assert second.messages is not None
    assert second.messages[2]["name"] == "y"


BAD_ROWS = [
    ("{not json", "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ({"text": 5}, "'text' must be text"),
    ({"text": "  "}, "'text' must be text"),
    ({"title": "no text"}, "'text' must be text"),
    ({"prompt": "alone"}, "'completion'"),
    ({"messages": []}, "at least one message"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
    ({"messages": "hi"}, "must be a list"),
    ({"messages": [{"content": "hi"}]}, "role"),
    ('{"text": "half \\ud800"}', "surrogate"),
]


@pytest.mark.parametrize(("row", "fault"), BAD_ROWS)
def test_bad_rows_are_named_and_skipped(tmp_path: Path, row: Any, fault: str) -> None:
    path, report = (
        write(tmp_path / "a.jsonl", {"text": "one"}, row, {"text": "two"}),
        CorpusReport(),
    )
    assert [document.text for document in read(path, report)] == ["one", "two"]
    assert (report.rows, report.bad) == (3, 1)
    assert report.faults[0].startswith(f"{path}:2: ")
    assert fault in report.faults[0]


documents = st.one_of(
    st.builds(Document, id=st.text(min_size=1), text=st.text(min_size=1)),
    st.builds(
        Document, id=st.text(min_size=1), text=st.text(min_size=1), prompt=st.text(min_size=1)
    ),
    st.builds(Document, id=st.text(min_size=1), messages=st.just(tuple(CHAT))),
)


@given(document=documents)
def test_a_shards_row_reads_back(document: Document) -> None:
    assert from_row(json.loads(json.dumps(to_row(document)))) == document


def test_what_is_routed_on() -> None:
    chat = Document(id="c", messages=tuple(CHAT))
    assert routed_text(chat, "last_user") == "And now?"
    assert routed_text(chat, "first_user") == "Hello"
    pair = Document(id="p", prompt="question ", text="answer")
    assert routed_text(pair, "last_user") == "question"
    assert full_text(pair) == "question \nanswer"
    assert full_text(chat).splitlines() == ["Be brief.", "Hello", "Hi", "And now?", "Bye"]


def test_a_document_as_a_request() -> None:
    chat = Document(id="c", messages=tuple(CHAT))
    assert [message.text for message in request_of(chat)] == [
        "Be brief.",
        "Hello",
        "Hi",
        "And now?",
    ]
    answer = {"role": "assistant", "content": "Bye"}
    for unasked in ((answer,), ({"role": "user", "content": ""}, answer)):
        assert request_of(Document(id="c", messages=unasked))[-1] == Message("assistant", "Bye")
    assert request_of(Document(id="t", text=" plain ")) == [Message("user", "plain")]
    pair = Document(id="p", prompt="question ", text="answer")
    assert request_of(pair) == [Message("user", "question")]


def test_a_run_stops_once_no_row_can_make_up_for_the_bad_ones(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", *({"text": f"word {i}"} for i in range(50)))
    bad = write(tmp_path / "bad.jsonl", *["{" * 200] * 2000)
    report = CorpusReport()
    config = DataConfig(train=[str(bad), str(good)], max_bad_share=0.01)
    with pytest.raises(CorpusError, match="max_bad_share"):
        list(read_documents(config.train, config, report))
    assert 300 <= report.rows < 2000, "certain long before the end, but not from the first row on"
    patient = CorpusReport()
    stream = read_documents([str(bad)], config, patient, later=["hub:endless"])
    assert list(stream) == []
    assert patient.bad == 2000, "a source of unknown size may hold any number of good rows"
