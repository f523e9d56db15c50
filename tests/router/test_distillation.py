from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from configs.schema import RouterConfig
from router import distillation, student_training
from router.conversation import Message
from router.distillation import FOLDS, Texts, cut_pieces
from router.errors import RouterFormatError
from router.model import Router
from router.storage import STUDENT_FILE
from router.student import Student
from router.student_confidence import Seen

if TYPE_CHECKING:
    from tests.router.conftest import WordEmbedder

TOPICS = (
    ("fry bake roast grill boil", "onions chicken potatoes fish rice", "pan pot oven dish bowl"),
    (
        "won lost drew began ended",
        "striker goalkeeper team coach fans",
        "match cup league half",
    ),
    ("sort parse reverse join split", "list string file tree table", "python code loop class bug"),
)


def corpus() -> list[str]:
    """1,485 distinct texts of three topics whose words differ, in a mixed order."""
    texts = [
        f"{verb} the {noun} and {other} of {place} {number}"
        for verbs, nouns, places in TOPICS
        for verb, noun, place in product(verbs.split(), nouns.split(), places.split())
        for number, other in enumerate(nouns.split()[:4])
    ]
    return [texts[place] for place in np.random.default_rng(0).permutation(len(texts))]


def taught(words: WordEmbedder, texts: list[str], **settings: object) -> Router:
    config = RouterConfig.model_validate(
        {"clusters": 3, "device": "cpu", "agreement": 0.95, **settings}
    )
    train, heldout = texts[150:], texts[:150]
    vectors, held = words.encode(train), words.encode(heldout)
    router = Router.fit(vectors, held, config, seed=0, embedder=words).router
    return router.taught(
        Texts(vectors, lambda rows: [train[row] for row in rows]),
        Texts(held, lambda rows: [heldout[row] for row in rows]),
    )


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*corpus(), *(f"{text} once more" for text in corpus()[:300])]


def test_a_taught_router_answers_most_and_survives_the_disk(
    words: WordEmbedder, texts: list[str], tmp_path: Path
) -> None:
    router = taught(words, texts)
    record = router.student
    assert record is not None
    assert record.short.answered > 0.5
    assert record.documents.agreement is not None
    assert record.documents.agreement >= record.target == 0.95
    assert record.pieces.texts == 0, "short documents are not cut"
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router", embedder=words)
    assert loaded.student == record
    conversations = [[Message("user", text)] for text in texts[:150]]
    routes = [router.quick_route(messages) for messages in conversations]
    assert [loaded.quick_route(messages) for messages in conversations] == routes
    sure = [(r, e) for r, e in zip(routes, router.embedder_routes(conversations), strict=True) if r]
    assert len(sure) > 75
    assert sum(quick.expert == slow.expert for quick, slow in sure) >= 0.9 * len(sure)
    taught(words, texts).save(tmp_path / "again")
    for file in (tmp_path / "router").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    (tmp_path / "router" / STUDENT_FILE).write_bytes(
        (tmp_path / "router" / "centroids.safetensors").read_bytes()
    )
    with pytest.raises(RouterFormatError, match=r"student\.safetensors"):
        Router.load(tmp_path / "router", embedder=words)


def test_no_student_is_measured_on_what_it_has_learnt(
    words: WordEmbedder, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: dict[int, set[str]] = {}
    exams: list[tuple[set[str], set[str]]] = []
    fit, seen = Student.fit, Student.seen

    def fitted(lessons: Sequence[str], *args: Any, **settings: Any) -> Student:
        student = fit(lessons, *args, **settings)
        learnt[id(student)] = set(lessons)
        return student

    def looked_at(student: Student, asked: Sequence[str]) -> Seen:
        exams.append((learnt[id(student)], set(asked)))
        return seen(student, asked)

    monkeypatch.setattr(student_training, "FEWEST_STEPS", 10)
    monkeypatch.setattr(student_training, "MOST_STEPS", 10)
    monkeypatch.setattr(distillation, "_rounded", lambda student: student)
    monkeypatch.setattr(Student, "fit", fitted)
    monkeypatch.setattr(Student, "seen", looked_at)
    taught(words, texts)
    assert len(exams) == FOLDS + 1
    assert all(not lessons & asked for lessons, asked in exams)
    assert set(texts) == set[str]().union(*(asked for _, asked in exams))
    assert set(texts[150:]) <= exams[-1][0], "the one that serves has learnt from all"
    exams.clear()
    monkeypatch.setattr(distillation, "ENOUGH_HELDOUT", 150)
    taught(words, texts)
    assert [asked for _, asked in exams] == [set(texts[:150])], "they are enough"


def test_few_documents_teach_nobody(words: WordEmbedder, texts: list[str]) -> None:
    router = taught(words, texts[:600])
    assert router.student is None
    assert router.quick_route([Message("user", texts[0])]) is None


def test_pieces_are_sentences_and_spans_of_long_documents() -> None:
    sentence = "The quick brown fox jumps over the lazy dog near the river bank today."
    long = " ".join([sentence] * 3 + ["A hen sits."])
    pieces = cut_pieces([long, "a short one"], 50, np.random.default_rng(0))
    assert pieces
    assert all(piece in long for piece in pieces)
    assert all(len(piece.split()) <= 15 for piece in pieces)
    assert cut_pieces(["a short one"], 50, np.random.default_rng(0)) == []
    assert len(cut_pieces([long] * 9, 3, np.random.default_rng(0))) <= 3
