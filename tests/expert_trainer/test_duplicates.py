import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_trainer import duplicates
from expert_trainer.duplicates import Signer, first_copies, near_copies, plan_bands

WORDS = [f"word{i}" for i in range(5000)]


def unrelated(count: int, seed: int, size: int = 60) -> list[str]:
    order = random.Random(seed)
    return [" ".join(order.choices(WORDS, k=size)) for _ in range(count)]


def edited(text: str, edits: int, order: random.Random) -> str:
    """The text with a few of its words replaced by new ones."""
    words = text.split()
    for place in order.sample(range(len(words)), edits):
        words[place] = f"edit{order.getrandbits(40)}"
    return " ".join(words)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(one: str, other: str) -> float:
    left, right = shingles(one), shingles(other)
    return len(left & right) / len(left | right)


def gone(texts: list[str], threshold: float, directory: Path) -> list[int]:
    found: list[int] = np.flatnonzero(
        near_copies(iter(texts), len(texts), threshold, directory)
    ).tolist()
    return found


@given(st.lists(st.integers(0, 30), max_size=60))
def test_the_first_of_equal_hashes_stands(values: list[int]) -> None:
    hashes = np.array([(value // 5, value % 5) for value in values], np.uint64).reshape(-1, 2)
    seen: set[int] = set()
    expected = [not (value in seen or seen.add(value)) for value in values]  # type: ignore[func-returns-value]
    assert first_copies(hashes).tolist() == expected


@given(st.integers(0, 9999), st.integers(2, 30), st.data())
@settings(max_examples=25)
def test_planted_copies_go_and_unrelated_texts_stay(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, data: st.DataObject
) -> None:
    """Of 200 words one changed leaves a similarity of about 0.95, five unlike 0.8."""
    order = random.Random(seed)
    originals = unrelated(count, seed, size=200)
    chosen = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    copies = [edited(originals[index], 1, order) for index in sorted(chosen)]
    texts = originals + copies
    directory = tmp_path_factory.mktemp("near")
    assert gone(texts, 0.8, directory) == list(range(count, len(texts)))
    backwards = gone(copies + originals, 0.8, directory)
    assert backwards == [len(copies) + index for index in sorted(chosen)], "the first one stands"


def test_what_stands_is_unlike_and_what_went_was_like(tmp_path: Path) -> None:
    """Over similarities from 0.3 to 1, with a margin for the estimate's error around 0.7."""
    order = random.Random(4)
    originals = unrelated(40, 1, size=120)
    texts = originals + [
        edited(text, edits, order) for text in originals for edits in (1, 3, 6, 12)
    ]
    went = set(gone(texts, 0.7, tmp_path))
    for index, text in enumerate(texts):
        earlier = [jaccard(text, texts[other]) for other in range(index)]
        standing = [jaccard(text, texts[other]) for other in range(index) if other not in went]
        if index in went:
            assert max(earlier) > 0.7 - 0.13
        else:
            assert max(standing, default=0) < 0.7 + 0.13
    assert 40 < len(went) < 160


def test_case_punctuation_and_spacing_do_not_count(tmp_path: Path) -> None:
    text = "The tide turned early, and the whole harbour knew about it."
    same = "the TIDE turned early and\n the whole harbour -- knew about it"
    assert gone([text, same], 1.0, tmp_path) == [1]


def test_short_texts_are_near_their_copies_alone(tmp_path: Path) -> None:
    texts = ["yes", "Yes!", "yes sir", "no", "one two three four", "one two three five", "NO."]
    assert gone(texts, 0.5, tmp_path) == [1, 6]


def test_texts_without_words_are_near_to_nothing(tmp_path: Path) -> None:
    assert gone(["!!!", "...", "", "!!!", "word"], 0.5, tmp_path) == []


def test_scripts_without_spaces_have_words_too(tmp_path: Path) -> None:
    text = "春はあけぼのやうやう白くなりゆく山際少し明かりて紫だちたる雲の細くたなびきたる" * 2
    other = "いづれの御時にか女御更衣あまたさぶらひたまひけるなかにいとやむごとなき際にはあらぬ"
    assert gone([text, text[:-1] + "よ", other], 0.7, tmp_path) == [1]


def test_no_texts(tmp_path: Path) -> None:
    assert near_copies(iter([]), 0, 0.8, tmp_path).shape == (0,)


def test_how_texts_are_batched_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = random.Random(0)
    originals = [*unrelated(30, 3), "short", "", "a b c d e f"]
    texts = originals + [edited(text, 1, order) for text in originals[:10]]
    signer = Signer()
    together = signer.sign(texts)
    alone = np.concatenate([Signer().sign([text]) for text in texts])
    np.testing.assert_array_equal(together, alone)
    expected = gone(texts, 0.7, tmp_path)
    monkeypatch.setattr(duplicates, "_BATCH_TEXTS", 3)
    monkeypatch.setattr(duplicates, "_CACHED_WORDS", 7)
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 2)
    assert gone(texts, 0.7, tmp_path) == expected == list(range(33, 43))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_what_they_are_to_find(threshold: float) -> None:
    bands = plan_bands(threshold)
    assert bands.recall(threshold) >= 0.995
    assert bands.count * bands.rows <= duplicates.PERMUTATIONS
    longer = duplicates.Bands(duplicates.PERMUTATIONS // (bands.rows + 1), bands.rows + 1)
    assert threshold == 1.0 or longer.recall(threshold) < 0.995


def test_the_estimate_is_as_good_as_said() -> None:
    order = random.Random(9)
    pairs = [(text, edited(text, 4, order)) for text in unrelated(150, 5, size=100)]
    signer = Signer()
    left = signer.sign([one for one, _ in pairs])
    right = signer.sign([other for _, other in pairs])
    errors = (left == right).mean(axis=1) - [jaccard(*pair) for pair in pairs]
    assert abs(errors.mean()) < 0.015
    assert errors.std() < 0.5 / np.sqrt(duplicates.PERMUTATIONS) * 1.2


def test_a_bucket_full_of_boilerplate_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that share much and are yet unlike are compared with a bounded number of others."""
    monkeypatch.setattr(duplicates, "MOST_LEADERS", 4)
    compared = 0
    similarity = duplicates._similarity

    def counted(*arguments: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        nonlocal compared
        compared += len(arguments[1])
        return similarity(*arguments)

    monkeypatch.setattr(duplicates, "_similarity", counted)
    licence = " ".join(WORDS[:60])
    texts = [f"{licence} {text}" for text in unrelated(200, 8, size=50)]
    assert gone(texts, 0.9, tmp_path) == []
    assert compared <= 200 * 4 * plan_bands(0.9).count


def test_texts_are_asked_for_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BATCH_TEXTS", 2)
    waiting = 0

    class Text(str):
        def __del__(self) -> None:
            nonlocal waiting
            waiting -= 1

    def texts() -> Iterator[str]:
        nonlocal waiting
        for text in unrelated(20, 2):
            waiting += 1
            assert waiting <= 5, "no more than two batches at a time"
            yield Text(text)

    near_copies(texts(), 20, 0.8, tmp_path)
