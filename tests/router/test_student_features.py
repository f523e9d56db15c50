"""Words, hashes and made-up queries."""

from __future__ import annotations

import numpy as np
import pytest

from router.student_features import CHARACTERS, WORDS, features_of, piece_hashes, words_of
from router.student_queries import made_up_queries

HASHES = [
    1540483477,
    3904355907,
    1908338681,
    1540483477,
    3851110558,
    3143782625,
    2275212333,
    962686218,
    2921532642,
]
PIECES = [2279463984, 2856923087, 893198166]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What's my BALANCE?", ["what", "'", "s", "my", "balance", "?"]),
        ("ｆｕｌｌ　width", ["full", "width"]),
        ("Ça coûte", ["ça", "coûte"]),
        ("残高 OK", ["残", "高", "ok"]),
        ("ab残cd", ["ab", "残", "cd"]),
        ("Привет мир", ["привет", "мир"]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_only_the_beginning_counts() -> None:
    assert len(words_of("a " * 10_000)) == WORDS
    assert words_of("x" * 1_000_000) == ["x" * CHARACTERS]
    assert sum(map(len, words_of("\ufdfa" * 10_000))) <= CHARACTERS


def test_order_of_words_counts() -> None:
    there, back = features_of([["from", "a", "to", "b"]]), features_of([["from", "b", "to", "a"]])
    assert set(there.hashes.tolist()) != set(back.hashes.tolist())
    assert len(np.unique(there.hashes)) > 10


def test_texts_together_have_the_features_of_each_alone() -> None:
    texts = [["one", "two"], [], ["three"], ["one", "two", "three", "four"]]
    together = features_of(texts)
    for place, text in enumerate(texts):
        alone = features_of([text])
        found = together.hashes[together.owner == place]
        assert sorted(found.tolist()) == sorted(alone.hashes.tolist())
        assert together.words[place] == alone.words[0]


def test_hashes_never_change() -> None:
    # A saved student knows features by these numbers.
    assert features_of([["a", "b"]]).hashes.tolist() == HASHES
    assert piece_hashes("ab") == PIECES


def test_like_words_share_pieces() -> None:
    assert set(piece_hashes("transfer")) & set(piece_hashes("transfers"))
    assert piece_hashes("a") == []


def test_made_up_queries_are_new_and_of_known_words() -> None:
    texts = ["what is my balance", "what is the weather in rome", "book a flight to rome"]
    queries = made_up_queries(texts, 20, seed=1)
    assert queries == made_up_queries(texts, 20, seed=1) != made_up_queries(texts, 20, seed=2)
    others = made_up_queries(texts, 20, seed=1, known=queries[:5])
    assert others
    assert not set(others) & set(queries[:5])
    assert len(queries) == len(set(queries)) <= 20
    assert len(queries) >= 10
    assert not set(queries) & set(texts)
    assert {word for q in queries for word in q.split()} <= {w for t in texts for w in t.split()}


@pytest.mark.parametrize("texts", [[], [""], ["one"], ["one two"]])
def test_of_next_to_nothing_nothing_is_made_up(texts: list[str]) -> None:
    assert made_up_queries(texts, 5, seed=0) == []
