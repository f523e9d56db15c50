from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.manifest import expert_id
from configs.schema import RouterConfig
from router.calibration import Calibration
from router.conversation import Message
from router.distillation import Texts
from router.embedder import Embedder, SentenceEmbedder
from router.errors import (
    CalibrationError,
    ClusteringError,
    EmbedderMismatchError,
    EmbedderNotFoundError,
    UnroutableError,
)
from router.model import Fitted, Router
from router.onnx_embedder import OnnxEmbedder
from router.storage import RouterRecord, read_router

if TYPE_CHECKING:
    from tests.router.conftest import Mixture, WordEmbedder


def config(**settings: Any) -> RouterConfig:
    return RouterConfig.model_validate(
        {"clusters": 3, "device": "cpu", "abstain_quantile": 0.1, **settings}
    )


def fit(mixture: Mixture, embedder: Embedder, seed: int = 0, **settings: Any) -> Fitted:
    vectors, heldout = embedder.encode(mixture.texts), embedder.encode(mixture.heldout)
    return Router.fit(vectors, heldout, config(**settings), seed=seed, embedder=embedder)


@pytest.fixture(scope="module")
def fitted(mixture: Mixture, minilm: SentenceEmbedder) -> Fitted:
    return fit(mixture, minilm)


@pytest.fixture(scope="module")
def router(fitted: Fitted) -> Router:
    return fitted.router


def topic_of_cluster(fitted: Fitted, mixture: Mixture) -> list[int]:
    """The topic that most texts of each cluster have."""
    pairs = list(zip(fitted.assignment.tolist(), mixture.topics, strict=True))
    return [
        Counter(topic for cluster, topic in pairs if cluster == wanted).most_common(1)[0][0]
        for wanted in range(fitted.router.clusters)
    ]


def test_clusters_are_topics(fitted: Fitted, mixture: Mixture) -> None:
    topics = topic_of_cluster(fitted, mixture)
    assert sorted(topics) == [0, 1, 2]
    assert [topics[cluster] for cluster in fitted.assignment] == mixture.topics
    assert [topics[cluster] for cluster in fitted.heldout_assignment] == mixture.heldout_topics


def test_new_texts_go_where_they_belong(fitted: Fitted, mixture: Mixture) -> None:
    texts = ["grill the fish on a hot plate", "the referee ended the match", "python dictionary"]
    topics = topic_of_cluster(fitted, mixture)
    assert [topics[route.cluster] for route in fitted.router.route(texts)] == [0, 1, 2]
    vectors = fitted.router.embedder.encode(texts)
    assert [topics[cluster] for cluster in fitted.router.assign(vectors)] == [0, 1, 2]


def test_the_router_abstains_on_what_it_never_saw(router: Router) -> None:
    (route,) = router.route(["a treaty between two medieval kingdoms"])
    assert route.abstained
    assert route.expert is None
    assert route.top[0].expert == expert_id(route.cluster)


def test_about_the_calibrated_share_of_heldout_text_is_turned_away(
    router: Router, mixture: Mixture
) -> None:
    routes = router.route(mixture.heldout)
    assert sum(route.abstained for route in routes) == int(0.1 * len(mixture.heldout))
    assert router.calibration.heldout_texts == len(mixture.heldout)
    assert router.threshold == router.calibration.threshold


def test_without_a_share_nothing_is_turned_away(mixture: Mixture, words: WordEmbedder) -> None:
    vectors, none = words.encode(mixture.texts), words.encode([])
    router = Router.fit(vectors, none, config(abstain_quantile=0), seed=0, embedder=words).router
    assert router.threshold == -1
    assert not any(route.abstained for route in router.route(["zebra", "quantum", ""]))


def test_experts_are_numbered_by_falling_size(fitted: Fitted) -> None:
    assert fitted.router.clusters == 3
    sizes = np.bincount(fitted.assignment)
    assert sorted(sizes.tolist(), reverse=True) == sizes.tolist()


@st.composite
def unit_rows(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((draw(st.integers(0, 40)), 384)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(unit_rows())
def test_what_holds_for_every_route(router: Router, rows: npt.NDArray[np.float32]) -> None:
    routes = router.route_embeddings(rows)
    assert len(routes) == len(rows)
    for route, row in zip(routes, rows, strict=True):
        cosines = np.sort(router.centroids @ row)[::-1]
        assert [candidate.score for candidate in route.top] == pytest.approx(cosines, abs=1e-5)
        assert route.score == route.top[0].score
        assert route.margin == pytest.approx(route.top[0].score - route.top[1].score, abs=1e-6)
        assert route.margin >= 0
        assert route.abstained == (route.score < router.threshold)
        assert route.expert == (None if route.abstained else expert_id(route.cluster))
        assert route.top[0].expert == expert_id(route.cluster)


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_as_many_candidates_as_asked_for_and_there(
    mixture: Mixture, words: WordEmbedder, top_k: int
) -> None:
    (route,) = fit(mixture, words, top_k=top_k).router.route(["bake the fish"])
    assert len(route.top) == min(top_k, 3)
    assert 0 <= route.margin < 1


def test_a_single_cluster_has_no_runner_up(mixture: Mixture, words: WordEmbedder) -> None:
    (route,) = fit(mixture, words, clusters=1).router.route(["bake the fish"])
    assert route.cluster == 0
    assert route.margin == pytest.approx(route.score + 1)


def test_balanced_shards_keep_their_bound(mixture: Mixture, words: WordEmbedder) -> None:
    fitted = fit(mixture, words, clusters=4, algorithm="balanced", balance_slack=1.0)
    assert np.bincount(fitted.assignment).max() <= -(-len(mixture.texts) // 4)
    nearest = fitted.router.assign(words.encode(mixture.texts))
    assert fitted.assignment.shape == nearest.shape
    assert not np.array_equal(fitted.assignment, nearest)


def test_near_duplicate_clusters_become_one_expert(mixture: Mixture, words: WordEmbedder) -> None:
    fitted = fit(mixture, words, clusters=12, merge_cosine=0.5)
    assert fitted.router.clusters < 12
    assert set(fitted.assignment.tolist()) == set(range(fitted.router.clusters))


def test_saved_and_loaded_it_routes_the_same(
    router: Router, mixture: Mixture, tmp_path: Path
) -> None:
    router.save(tmp_path)
    loaded = Router.load(tmp_path, device="cpu")
    assert loaded.embedder is not router.embedder
    assert loaded.calibration == router.calibration
    assert loaded.route(mixture.heldout) == router.route(mixture.heldout)


@given(st.integers(1, 6), st.floats(0, 1), st.integers(1, 5), st.integers(0, 9))
def test_any_router_survives_the_disk(
    mixture: Mixture,
    words: WordEmbedder,
    tmp_path_factory: pytest.TempPathFactory,
    clusters: int,
    quantile: float,
    top_k: int,
    seed: int,
) -> None:
    settings = {"clusters": clusters, "abstain_quantile": quantile, "top_k": top_k}
    router = fit(mixture, words, seed=seed, **settings).router
    directory = tmp_path_factory.mktemp("router")
    router.save(directory)
    loaded = Router.load(directory, embedder=words)
    assert loaded.route(mixture.heldout) == router.route(mixture.heldout)


FIT = """
import sys
from pathlib import Path
from configs.schema import RouterConfig
from router.embedder import load_embedder
from router.model import Router
texts = sys.stdin.read().splitlines()
config = RouterConfig(clusters=3, device="cpu")
embedder = load_embedder(config.embedder, device="cpu", batch_size=32, max_tokens=64)
vectors = embedder.encode(texts)
fitted = Router.fit(vectors[6:], vectors[:6], config, seed=0, embedder=embedder)
fitted.router.save(Path(sys.argv[1]))
"""


def test_two_processes_fit_the_same_router(mixture: Mixture, tmp_path: Path) -> None:
    def fit_in_a_process(name: str) -> None:
        subprocess.run(
            [sys.executable, "-c", FIT, str(tmp_path / name)],
            input="\n".join(mixture.texts[:36]),
            text=True,
            check=True,
        )

    with ThreadPoolExecutor() as both:
        list(both.map(fit_in_a_process, ("one", "two")))
    for file in ("router.json", "centroids.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_another_embedder_is_refused(mixture: Mixture, words: WordEmbedder, tmp_path: Path) -> None:
    fit(mixture, words).router.save(tmp_path)
    other = type(words)(digest="other words")
    with pytest.raises(EmbedderMismatchError, match=r"'words' is not the one.*introvert fit"):
        Router.load(tmp_path, embedder=other)


def test_an_embedder_that_is_gone_is_named(
    mixture: Mixture, words: WordEmbedder, tmp_path: Path
) -> None:
    fit(mixture, words).router.save(tmp_path)
    with pytest.raises(EmbedderNotFoundError, match="'words'"):
        Router.load(tmp_path, device="cpu")


def test_too_few_texts_are_refused(words: WordEmbedder) -> None:
    vectors = words.encode(["a", "b", "a"])
    with pytest.raises(ClusteringError, match=r"only 2 distinct texts.*router\.clusters to 2"):
        Router.fit(vectors, vectors, config(), seed=0, embedder=words)


def test_no_heldout_text_is_refused(words: WordEmbedder) -> None:
    vectors = words.encode(["a", "b", "c"])
    with pytest.raises(CalibrationError, match=r"data\.valid"):
        Router.fit(vectors, vectors[:0], config(), seed=0, embedder=words)


class Compass:
    """An embedder whose texts are angles in degrees, so that every cosine is known."""

    name = "compass"
    digest = "compass"
    dimension = 2

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, texts: Any) -> npt.NDArray[np.float32]:
        self.calls.append(list(texts))
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def compass(**settings: Any) -> tuple[Router, Compass]:
    """A router with experts at 0 (expert-0000) and 90 degrees (expert-0001); abstains below 0.5."""
    embedder = Compass()
    record = RouterRecord(
        embedder=embedder.name,
        embedder_digest=embedder.digest,
        dimension=2,
        clusters=2,
        config=config(clusters=2, sticky_margin=0.2, **settings),
        calibration=Calibration(threshold=0.5, quantile=0.1, heldout_texts=1, score_quantiles={}),
        seed=0,
    )
    return Router(record, np.eye(2, dtype=np.float32), embedder), embedder


def chat(*turns: str) -> list[Message]:
    """User turns with answers between them."""
    return [m for turn in turns for m in (Message("user", turn), Message("assistant", "7"))]


@pytest.mark.parametrize(
    ("turns", "expert"),
    [
        (["0"], "expert-0000"),
        (["0", "48"], "expert-0000"),  # ahead at 90 by 0.07: not clearly
        (["90", "48"], "expert-0001"),
        (["0", "80"], "expert-0001"),  # ahead at 90 by 0.81
        (["0", "200"], "expert-0000"),  # nobody's text stays at home
        (["200", "80"], "expert-0001"),  # a conversation without an expert takes the first it finds
        (["-70", "48"], "expert-0001"),  # at -70 it is nearest to 0, but not at home there
        (["200", "210"], None),
        (["0", "80", "20"], "expert-0000"),
    ],
)
def test_a_sticky_conversation_stays_unless_another_wins_clearly(
    turns: list[str], expert: str | None
) -> None:
    router, _ = compass()
    (route,) = router.route_conversations([chat(*turns)])
    assert route.expert == expert


def test_a_conversation_that_stays_has_the_route_of_its_first_turn() -> None:
    router, _ = compass()
    assert router.route_conversations([chat("10", "48")]) == router.route(["10"])


def test_without_sticky_only_the_text_counts() -> None:
    router, embedder = compass(sticky=False)
    assert router.route_conversations([chat("0", "48")])[0].expert == "expert-0001"
    assert embedder.calls == [["48"]]


def test_a_first_turn_is_embedded_once() -> None:
    router, embedder = compass()
    router.route_conversations([chat("0")])
    assert embedder.calls == [["0"]]


def test_first_user_never_leaves_home() -> None:
    router, embedder = compass(route_on="first_user")
    assert router.route_conversations([chat("0", "90")])[0].expert == "expert-0000"
    assert embedder.calls == [["0"]]


def test_conversations_are_embedded_together_and_each_text_once() -> None:
    router, embedder = compass()
    conversations = [chat("0", "80"), chat("90"), chat("0", "48"), chat("80")]
    routes = router.route_conversations(conversations)
    assert len(embedder.calls) == 1
    assert sorted(embedder.calls[0]) == ["0", "48", "80", "90"]
    assert routes == [router.route_conversations([one])[0] for one in conversations]


def test_nothing_asked_nothing_answered(router: Router) -> None:
    assert router.route([]) == []
    assert router.route_conversations([]) == []
    assert router.assign(router.embedder.encode([])).shape == (0,)


def test_a_conversation_without_text_is_refused(router: Router) -> None:
    with pytest.raises(UnroutableError, match="no text"):
        router.route_conversations([[Message("user", "")]])


def test_a_route_is_plain_data(router: Router) -> None:
    (route,) = router.route(["bake the fish"])
    assert type(route.cluster) is int
    assert {type(number) for number in (route.score, route.margin, route.top[0].score)} == {float}
    assert json.loads(json.dumps(dataclasses.asdict(route)))["score"] == route.score


def texts_of(texts: Sequence[str], embedder: Embedder) -> Texts:
    return Texts(embedder.encode(texts), lambda wanted: [texts[place] for place in wanted])


def halves(mixture: Mixture, embedder: Embedder) -> tuple[Texts, Texts]:
    return texts_of(mixture.texts[::2], embedder), texts_of(mixture.texts[1::2], embedder)


def test_8_bits_are_measured_and_then_served(
    router: Router, mixture: Mixture, minilm: SentenceEmbedder, tmp_path: Path
) -> None:
    router.save(tmp_path / "plain")
    measured = router.quantized(*halves(mixture, minilm))
    measured.save(tmp_path / "measured")
    record, _ = read_router(tmp_path / "measured")
    assert record.quantized is not None
    assert record.quantized.texts == len(mixture.texts)
    assert record.quantized.agreement >= 0.995, "the topics lie far apart"
    served = {
        name: Router.load(tmp_path / name, device="cpu", threads=1, runtime="onnx").embedder
        for name in ("plain", "measured")
    }
    assert isinstance(served["plain"], OnnxEmbedder)
    assert isinstance(served["measured"], OnnxEmbedder)
    assert not served["plain"].quantized, "nobody knows what 8 bits would do"
    assert served["measured"].quantized
    assert measured.route(mixture.heldout) == router.route(mixture.heldout), "of the same embedder"


def test_routes_that_8_bits_change_are_decided_again(
    mixture: Mixture, minilm: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = OnnxEmbedder.encode

    def elsewhere(self: OnnxEmbedder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        rows = encode(self, texts)
        rows[0] = -rows[0]
        return rows

    monkeypatch.setattr(OnnxEmbedder, "encode", elsewhere)
    router = fit(mixture, minilm, quantized_agreement=0.999).router
    record = router.quantized(*halves(mixture, minilm))._record
    found = record.quantized
    assert found is not None
    assert found.agreement == 1, "what is decided again is right"
    assert found.lead > 0
    assert found.doubted >= 1 / len(mixture.texts)

    def may(quantized: dict[str, object] | None = None, **config: object) -> bool:
        changed = record.model_copy(
            update={
                "config": record.config.model_copy(update=config),
                "quantized": found.model_copy(update={"doubted": 0.1, **(quantized or {})}),
            }
        )
        return changed.may_be_quantized

    assert may()
    assert not may({"doubted": 0.3}), "all in 32 bits is about as fast"
    assert not may({"levels": found.levels - 1}), "nobody knows what this machine does to routes"
    assert not may({"rounding": found.rounding - 1}), "it was measured with another rounding"
    assert not may({"agreement": 0.99})
    assert may({"agreement": 0.99}, quantized_agreement=0.5)
    assert not may(quantized_agreement=None)


@pytest.mark.parametrize("lead", [0.0, 0.05, 2.0])
def test_a_close_decision_is_made_in_32_bits(
    router: Router, mixture: Mixture, minilm: SentenceEmbedder, tmp_path: Path, lead: float
) -> None:
    measured = router.quantized(*halves(mixture, minilm))
    found = measured._record.quantized
    assert found is not None
    update = {"quantized": found.model_copy(update={"lead": lead, "doubted": 0.1})}
    measured._record = measured._record.model_copy(update=update)
    measured.save(tmp_path)
    served = Router.load(tmp_path, device="cpu", threads=1, runtime="onnx")
    full = Router.load(tmp_path, device="cpu", threads=1, embedder=minilm)
    vectors, exact = served.embed(mixture.heldout), full.embed(mixture.heldout)
    quick = served.embedder.encode(mixture.heldout)
    leads = [full._lead(route) for route in served.route_embeddings(quick)]
    again = [
        bool(np.allclose(row, wanted, atol=1e-5))
        for row, wanted in zip(vectors, exact, strict=True)
    ]
    assert again == [lead > 0 and each <= lead for each in leads]
    routes = served.route_embeddings(vectors)
    assert served.route(mixture.heldout) == routes
    asked = [[Message("user", text)] for text in mixture.heldout]
    assert served.route_conversations(asked) == routes


def test_where_8_bits_cannot_be_had_nothing_is_said_of_them(
    mixture: Mixture, minilm: SentenceEmbedder
) -> None:
    router = fit(mixture, minilm, runtime="torch").router
    assert router.quantized(*halves(mixture, minilm))._record.quantized is None


def test_an_embedder_of_another_kind_has_no_8_bits(mixture: Mixture, words: WordEmbedder) -> None:
    router = fit(mixture, words).router
    assert router.quantized(*halves(mixture, words)) is router
