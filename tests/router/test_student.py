"""The student on small made-up subjects, each with words of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from router.errors import RouterFormatError
from router.guess import TOP, Guess
from router.student import Student

SUBJECTS = {
    "money": ("account", "balance", "transfer", "deposit", "savings", "card", "bank"),
    "travel": ("flight", "luggage", "passport", "hotel", "airport", "visa", "ticket"),
    "food": ("recipe", "oven", "flour", "butter", "restaurant", "dinner", "soup"),
}
COMMON = ("please", "what", "is", "my", "the", "can", "you", "tell", "me", "about")
TEXTS = 600


def made_up(count: int, seed: int) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Texts of one subject each, and cosines that say which: shape (count, 3)."""
    rng = random.Random(seed)
    subjects = list(SUBJECTS)
    texts, cosines = [], np.full((count, len(subjects)), 0.1, dtype=np.float32)
    for number in range(count):
        subject = rng.randrange(len(subjects))
        words = rng.sample(SUBJECTS[subjects[subject]], 2) + rng.sample(COMMON, 4)
        rng.shuffle(words)
        texts.append(" ".join(words))
        cosines[number, subject] = 0.6
    return texts, cosines


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.fit(*made_up(TEXTS, 1), seed=0)


def same(left: Guess, right: Guess) -> bool:
    return left.cluster == right.cluster and left.score == pytest.approx(right.score, abs=1e-4)


def test_texts_never_seen_go_where_the_embedder_sends_them(student: Student) -> None:
    texts, cosines = made_up(200, 2)
    guesses = student.guess_many(texts)
    assert np.mean([g.cluster for g in guesses] == cosines.argmax(axis=1)) > 0.98
    assert np.mean([abs(g.score - 0.6) for g in guesses]) < 0.1
    assert all(0 <= g.confidence <= 1 for g in guesses)


def test_it_is_less_sure_of_words_it_never_saw(student: Student) -> None:
    known = student.guess("what is my account balance")
    strange = student.guess("quod erat demonstrandum zyx")
    assert strange.confidence < known.confidence


def test_many_are_guessed_as_one_is(student: Student) -> None:
    texts = [*made_up(300, 3)[0], "", "残高を教えて", "word " * 1000]
    many = student.guess_many(texts)
    assert len(many) == len(texts)
    assert all(same(student.guess(text), guess) for text, guess in zip(texts, many, strict=True))
    assert student.guess_many([]) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "\ud800 lone",
        "\x00",
        "🙂🙂",
        "สวัสดีครับ",
        "नमस्ते दुनिया",
        "a" * 8_000_000,
        "?" * 9999,
    ],
    ids=["empty", "blank", "surrogate", "nul", "emoji", "thai", "hindi", "one word", "marks"],
)
def test_any_text_has_a_guess(student: Student, text: str) -> None:
    guess = student.guess(text)
    assert guess.cluster == guess.clusters[0]
    assert np.isfinite(guess.scores).all()
    assert np.all(np.diff(guess.scores) <= 0)


def test_what_is_saved_guesses_the_same(student: Student) -> None:
    restored = Student.restore(student.arrays(), student.settings())
    for text in made_up(50, 4)[0]:
        before, after = student.guess(text), restored.guess(text)
        assert before.cluster == after.cluster
        assert before.confidence == after.confidence
        assert np.array_equal(before.scores, after.scores)


def _without(name: str) -> Any:
    return lambda arrays, settings: arrays.pop(name)


def _with(name: str, value: Any) -> Any:
    return lambda arrays, settings: settings.update({name: value})


def _changed(name: str, change: Any) -> Any:
    return lambda arrays, settings: arrays.update({name: change(arrays[name])})


@pytest.mark.parametrize(
    "damage",
    [
        _without("table"),
        _with("format", 99),
        _with("clusters", 4),
        _with("features", "many"),
        _changed("hashes", lambda a: a[::-1].copy()),
        _changed("inner", lambda a: a[:-1]),
        _changed("outer", lambda a: a * np.nan),
        _changed("confidence", lambda a: a[:-1]),
        _changed("table", lambda a: a[0]),
    ],
)
def test_what_does_not_fit_together_is_refused(student: Student, damage: Any) -> None:
    arrays = dict(student.arrays())
    settings: dict[str, int | float | str] = dict(student.settings())
    damage(arrays, settings)
    with pytest.raises(RouterFormatError):
        Student.restore(arrays, settings)


def test_many_clusters_are_fitted_from_a_function() -> None:
    texts, few = made_up(300, 5)
    asked: list[int] = []

    def rows(places: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        asked.extend(places.tolist())
        wide = np.full((len(places), 600), -0.1, dtype=np.float32)
        wide[:, :3] = few[places]
        return wide

    student = Student.fit(texts, rows, seed=0)
    assert set(asked) == set(range(len(texts)))
    guesses = student.guess_many(texts)
    assert np.mean([g.cluster for g in guesses] == few.argmax(axis=1)) > 0.98
    assert guesses[0].clusters.shape == guesses[0].scores.shape == (TOP,)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_handful_of_texts_is_enough(count: int) -> None:
    texts, cosines = made_up(count, 6)
    student = Student.fit(texts, cosines, seed=0)
    assert [g.cluster for g in student.guess_many(texts)] == cosines.argmax(axis=1).tolist()


def test_one_cluster_is_certain() -> None:
    texts, cosines = made_up(20, 7)
    guess = Student.fit(texts, cosines[:, :1], seed=0).guess(texts[0])
    assert guess.cluster == 0
    assert guess.confidence > 0.99


SCRIPT = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from tests.router.test_student import made_up
from router.student import Student
student = Student.fit(*made_up(60, 8), seed=3)
print(hashlib.sha256(b"".join(a.tobytes() for a in student.arrays().values())).hexdigest())
"""


def test_every_process_fits_the_same(request: pytest.FixtureRequest) -> None:
    def digest(salt: str) -> str:
        script = SCRIPT.format(tests=str(request.config.rootpath))
        environment: Mapping[str, str] = {**os.environ, "PYTHONHASHSEED": salt}
        return subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout

    assert digest("1") == digest("2")
