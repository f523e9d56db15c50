from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from configs.schema import RouterConfig
from router import distillation, encoder_training
from router.cascade import Cascade
from router.conversation import Message
from router.distillation import Texts
from router.encoder import Encoder
from router.encoder_graph import ENTRY, HEAD
from router.encoder_training import can_be_cut, train_encoder
from router.errors import RouterFormatError
from router.guess import TEMPERATURE, blended
from router.measuring import Earlier, Exam, Pair, Terms, measure
from router.model import Router
from router.quantization import LEVELS, levels_here
from router.storage import ENCODER_FILE
from router.student_confidence import MEASURES_OF_TWO, shape_of, unfitted

if TYPE_CHECKING:
    from router.embedder import SentenceEmbedder
    from tests.router.conftest import Mixture, WordEmbedder

Learnt = tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]
ODD = ["", "weather", "two words", "ein \ud83d Rest", "long " * 300, "日本語のテキスト"]


def centroids_of(minilm: SentenceEmbedder, mixture: Mixture) -> npt.NDArray[np.float32]:
    vectors = minilm.encode(mixture.texts)
    means = [vectors[np.array(mixture.topics) == topic].mean(axis=0) for topic in range(3)]
    return np.array([mean / np.linalg.norm(mean) for mean in means], dtype=np.float32)


@pytest.fixture(scope="module")
def cosines(minilm: SentenceEmbedder, mixture: Mixture) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = minilm.encode(mixture.texts) @ centroids_of(minilm, mixture).T
    return rows


def learn(minilm: SentenceEmbedder, mixture: Mixture, cosines: npt.NDArray[np.float32]) -> Learnt:
    return train_encoder(minilm, mixture.texts, cosines, layers=1, seed=0, threads=1)


@pytest.fixture(scope="module")
def learnt(minilm: SentenceEmbedder, mixture: Mixture, cosines: npt.NDArray[np.float32]) -> Learnt:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_training, "EPOCHS", 60)
        return learn(minilm, mixture, cosines)


def test_it_learns_to_name_the_embedder_s_clusters(
    minilm: SentenceEmbedder, mixture: Mixture, learnt: Learnt
) -> None:
    guesses = Encoder(*learnt).guess_many(mixture.heldout)
    held = minilm.encode(mixture.heldout) @ centroids_of(minilm, mixture).T
    right = [guess.cluster == row.argmax() for guess, row in zip(guesses, held, strict=True)]
    assert np.mean(right) > 0.9
    errors = [abs(g.score - row.max()) for g, row in zip(guesses, held, strict=True)]
    assert np.median(errors) < 0.25, "what it estimates is a cosine"
    assert all(np.all(np.diff(guess.scores) <= 0) for guess in guesses)


def test_the_graph_computes_what_was_trained(
    minilm: SentenceEmbedder, mixture: Mixture, cosines: npt.NDArray[np.float32]
) -> None:
    import torch

    arrays, settings = learn(minilm, mixture, cosines)
    bert = encoder_training._cut(minilm, 1).eval()
    head = {name: arrays[name] for name in (*HEAD, "tokenizer")}
    of_eight, of_32 = (
        Encoder(encoder_training._arrays(bert, 128) | head, {**settings, "levels": levels})
        for levels in (levels_here(), LEVELS + 1)
    )
    texts = [*mixture.heldout, *ODD]
    readable = [text.encode("utf-8", "replace").decode() for text in texts]
    ids = [of_32._tokenizer.encode(text).ids for text in readable]
    with torch.no_grad():
        pooled = encoder_training._pooled(bert, ids, "cpu").numpy()
    wanted = pooled @ arrays[HEAD[0]] + arrays[HEAD[1]]
    assert settings["levels"] == levels_here()
    np.testing.assert_allclose(of_32._logits(ids), wanted, atol=2e-3)
    np.testing.assert_allclose(of_eight._logits(ids), wanted, atol=0.03)


def test_a_text_is_guessed_alone_as_among_others(learnt: Learnt, mixture: Mixture) -> None:
    encoder = Encoder(*learnt)
    texts = [*mixture.heldout, *ODD]
    for text, among in zip(texts, encoder.guess_many(texts), strict=True):
        alone = encoder.guess(text)
        np.testing.assert_allclose(alone.scores, among.scores, atol=1e-5)
        assert alone.confidence == pytest.approx(among.confidence, abs=1e-5)
    assert encoder.guess_many([]) == []


def test_it_reads_what_the_embedder_reads_and_no_more(
    minilm: SentenceEmbedder, learnt: Learnt
) -> None:
    encoder = Encoder(*learnt)

    def differs(words: int) -> tuple[bool, bool]:
        one, other = ("long " * words + word for word in ("river", "engine"))
        guesses, vectors = encoder.guess_many([one, other]), minilm.encode([one, other])
        return (
            not np.allclose(guesses[0].scores, guesses[1].scores, atol=1e-6),
            not np.allclose(vectors[0], vectors[1], atol=1e-6),
        )

    assert minilm.max_tokens == 128
    assert differs(120) == (True, True)
    assert differs(130) == (False, False)


def test_the_embedder_stays_as_it_was_and_a_seed_gives_the_same(
    minilm: SentenceEmbedder, mixture: Mixture, cosines: npt.NDArray[np.float32]
) -> None:
    before = minilm.encode(mixture.heldout)
    (first, settings), (second, _) = (learn(minilm, mixture, cosines) for _ in range(2))
    assert settings["layers"] == 1
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert len(minilm.model[0].auto_model.encoder.layer) == 6
    assert np.array_equal(minilm.encode(mixture.heldout), before)


def test_what_does_not_fit_is_refused(learnt: Learnt) -> None:
    arrays, settings = learnt
    with pytest.raises(RouterFormatError, match="format"):
        Encoder(arrays, {**settings, "format": 2})
    with pytest.raises(RouterFormatError, match="incomplete"):
        Encoder({k: v for k, v in arrays.items() if k != "0.wide"}, settings)
    for name in ("0.inward", HEAD[0], ENTRY[1], "words"):
        with pytest.raises(RouterFormatError, match="do not fit"):
            Encoder({**arrays, name: arrays[name][:-1]}, settings)
    broken = arrays["0.wide"].copy()
    broken[0, 0] = np.nan
    with pytest.raises(RouterFormatError, match="do not fit"):
        Encoder({**arrays, "0.wide": broken}, settings)
    for confidence in (unfitted(3)[:, 1:], np.full_like(unfitted(3, MEASURES_OF_TWO), np.nan)):
        with pytest.raises(RouterFormatError, match="do not fit"):
            Encoder({**arrays, "confidence": confidence}, settings)
    with pytest.raises(RouterFormatError, match="tokenizer"):
        Encoder({**arrays, "tokenizer": arrays["tokenizer"][:-9]}, settings)


def test_after_another_student_it_is_as_sure_as_it_was_told(
    learnt: Learnt, mixture: Mixture
) -> None:
    encoder, texts = Encoder(*learnt), mixture.heldout
    firsts = encoder.guess_many(texts[::-1])
    own = encoder.guess_many(texts)
    scores, clusters = blended(
        firsts, np.stack([g.scores for g in own]), np.stack([g.clusters for g in own])
    )
    for guess, wanted, of in zip(encoder.guess_after(firsts, texts), scores, clusters, strict=True):
        assert guess.clusters.tolist() == of.tolist()
        assert guess.cluster == of[0]
        margin = (wanted[0] - wanted[1]) / TEMPERATURE
        assert guess.confidence == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-4)
        np.testing.assert_allclose(guess.scores, wanted, atol=1e-6)
    assert encoder.guess_after([], []) == []
    of_clusters = np.zeros(shape_of(MEASURES_OF_TWO, 3), dtype=np.float32)
    of_clusters[:, -3:] = [-1, 0, 1]
    told = encoder.with_confidence(of_clusters)
    for other in (told, Encoder(told.arrays(), told.settings())):
        for guess in other.guess_after(firsts, texts):
            wanted_chance = 1 / (1 + np.exp(1 - guess.cluster))
            assert guess.confidence == pytest.approx(wanted_chance, abs=1e-5)
    assert "confidence" not in encoder.arrays(), "the one that it was made of is as it was"


def test_a_router_is_taught_both_and_keeps_them_on_disk(
    minilm: SentenceEmbedder, mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "LEAST_DOCUMENTS", 10)
    monkeypatch.setattr(distillation, "MOST_FOR_ENCODER", 50)

    lessons: list[str] = []

    def train(embedder: Any, texts: list[str], *args: Any, **settings: Any) -> Learnt:
        lessons.extend(texts)
        return train_encoder(embedder, texts, *args, **settings)

    def pair(exam: Exam, first: Any, rows: Any, second: Any, terms: Terms) -> Pair:
        asked = set(exam.of(rows).texts)
        assert not asked & set(lessons), "it has not learnt from what it is measured on"
        assert asked >= set(mixture.heldout)
        assert asked & set(mixture.texts), "a fold was left aside"
        assert asked | set(lessons) >= set(mixture.texts)
        one, answers = measure(exam, first, terms)
        earlier = Earlier(exam, answers, rows)
        return Pair(one, measure(exam.of(rows), second, terms, earlier)[0], work=0.0)

    monkeypatch.setattr(distillation, "measure_pair", pair)
    monkeypatch.setattr(distillation, "train_encoder", train)
    config = RouterConfig(
        clusters=3, device="cpu", agreement=0.5, encoder_layers=1, abstain_quantile=0.0
    )
    train, held = minilm.encode(mixture.texts), minilm.encode(mixture.heldout)
    plain = Router.fit(train, held, config, seed=0, embedder=minilm).router
    told: list[tuple[str, int, int]] = []
    router = plain.taught(
        Texts(train, lambda rows: [mixture.texts[row] for row in rows]),
        Texts(held, lambda rows: [mixture.heldout[row] for row in rows]),
        lambda *progress: told.append(progress),
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages[-2:] == ["teaching the student", "teaching the encoder"]
    steps = [(done, total) for stage, done, total in told if stage == stages[-1]]
    assert [done for done, _ in steps] == list(range(len(steps)))
    assert {total for _, total in steps} == {len(steps) - 1}
    for stage in stages:
        done, total = [told_of[1:] for told_of in told if told_of[0] == stage][-1]
        assert done == total
    assert router.student is not None
    assert router.encoder is not None
    assert router.encoder.documents.answered >= router.student.documents.answered
    router.save(tmp_path)
    loaded = Router.load(tmp_path, embedder=minilm)
    assert loaded.encoder == router.encoder
    chats = [[Message("user", text)] for text in mixture.heldout]
    assert loaded.route_conversations(chats) == router.route_conversations(chats)
    (tmp_path / ENCODER_FILE).unlink()
    with pytest.raises(RouterFormatError, match=r"encoder\.safetensors is missing"):
        Router.load(tmp_path, embedder=minilm)
    plain.save(tmp_path)
    assert Router.load(tmp_path, embedder=minilm).encoder is None


def test_other_embedders_cannot_be_cut(words: WordEmbedder, minilm: SentenceEmbedder) -> None:
    assert can_be_cut(minilm)
    assert not can_be_cut(words)


def test_a_cascade_names_its_steps() -> None:
    record: Any = None
    second = Cascade(record, record, 8)
    first = Cascade(record, record, 8, second)
    assert first.steps == (first, second)
    assert second.steps == (second,)
