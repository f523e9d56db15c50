from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from configs.schema import RouterConfig
from router import cascade as cascade_module
from router.calibration import Calibration, Sureness
from router.cascade import Cascade, Measured, StudentRecord
from router.conversation import Message
from router.errors import UnroutableError
from router.guess import (
    BLEND,
    SHORT_CHARACTERS,
    TEMPERATURE,
    Guess,
    blended,
    guesses_of,
    lead_confidences,
)
from router.model import Router
from router.storage import RouterRecord
from router.types import Candidate

LEAD_ERROR = 0.05
STICKY_MARGIN = 0.2


def together(first: Guess, second: Guess) -> Guess:
    scores, clusters = blended([first], second.scores[None], second.clusters[None])
    values = scores / np.float32(TEMPERATURE)
    return guesses_of(values, clusters, lead_confidences(values))[0]


class Parrot:
    """A student whose texts say what to guess: `CONFIDENCE SCORE-OF-0 SCORE-OF-1 ...`."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def guess(self, text: str) -> Guess:
        self.asked.append(text)
        confidence, *scores = map(float, text.split())
        order = np.argsort(-np.array(scores), kind="stable")
        falling = np.array(scores, dtype=np.float32)[order]
        return Guess(int(order[0]), confidence, float(falling[0]), falling, order)

    def guess_many(self, texts: Sequence[str]) -> list[Guess]:
        return [self.guess(text) for text in texts]

    def guess_after(self, firsts: Sequence[Guess], texts: Sequence[str]) -> list[Guess]:
        return [together(*pair) for pair in zip(firsts, self.guess_many(texts), strict=True)]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {}


class Echo:
    """An embedder that puts every text at the second centroid."""

    name = digest = "echo"
    dimension = 2

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.calls.append(list(texts))
        return np.tile(np.array([0, 1], dtype=np.float32), (len(texts), 1))


def sureness(confidence: float | None) -> Sureness:
    return Sureness(confidence=confidence, score=0.5, texts=1, answered=1.0, agreement=1.0)


def make_record(short: float | None = 0.9, long: float | None = 0.9) -> StudentRecord:
    return StudentRecord(
        target=0.99,
        short=sureness(short),
        long=sureness(long),
        documents=Measured(texts=0, answered=0.0, agreement=None),
        pieces=Measured(texts=0, answered=0.0, agreement=None),
        lead_error=LEAD_ERROR,
        training_texts=1,
        settings={},
    )


def make_router(
    record: StudentRecord | None = None, **settings: Any
) -> tuple[Router, Parrot, Echo]:
    """A router over two clusters at right angles that abstains below 0.5."""
    record, student, embedder = record or make_record(), Parrot(), Echo()
    config = RouterConfig(clusters=2, sticky_margin=STICKY_MARGIN, **settings)
    whole = RouterRecord(
        embedder="echo",
        embedder_digest="echo",
        dimension=2,
        clusters=2,
        config=config,
        calibration=Calibration(threshold=0.5, quantile=0.1, heldout_texts=1, score_quantiles={}),
        seed=0,
        student=record,
    )
    cascade = Cascade(student, record, config.max_tokens)
    return Router(whole, np.eye(2, dtype=np.float32), embedder, cascade), student, embedder


def turns(*texts: str) -> list[Message]:
    return [Message("user", text) for text in texts]


def test_what_the_student_is_sure_of_needs_no_embedder() -> None:
    router, _, embedder = make_router()
    (route,) = router.route(["0.95 0.75 0.25"])
    assert route.by == "student"
    assert (route.expert, route.cluster, route.abstained) == ("expert-0000", 0, False)
    assert (route.score, route.margin) == (0.75, 0.5)
    assert route.top == (Candidate("expert-0000", 0.75), Candidate("expert-0001", 0.25))
    assert embedder.calls == []
    assert router.quick_route(turns("0.95 0.75 0.25")) == route


def test_a_second_student_is_asked_what_the_first_is_not_sure_of() -> None:
    router, first, embedder = make_router()
    second = Parrot()
    # of a second student the lead of the best cluster says how sure it is: 0.5 is, 0.01 is not
    cascade = Cascade(first, make_record(), 128, Cascade(second, make_record(), 128))
    both = Router(router._record, router.centroids, embedder, cascade)
    texts = ["0.95 0.75 0.25", "0.85 0.75 0.25", "0.85 0.75 0.74"]
    routes = both.route_conversations([turns(text) for text in texts])
    assert [route.by for route in routes] == ["student", "student", "embedder"]
    assert [route.expert for route in routes] == ["expert-0000", "expert-0000", "expert-0001"]
    assert second.asked == texts[1:]
    assert embedder.calls == [texts[2:]]
    assert both.quick_route(turns(texts[1])) is None, "it is not quick enough for that"
    assert len(second.asked) == 2


def test_a_second_student_is_not_asked_where_the_first_is_at_a_loss() -> None:
    limits = sureness(0.9).model_copy(update={"asked_from": 0.5})
    record = make_record().model_copy(update={"short": limits})
    first, second = Parrot(), Parrot()
    cascade = Cascade(first, make_record(), 128, Cascade(second, record, 128))
    long = "0.1 0.75 0.25" + " " * SHORT_CHARACTERS
    texts = ["0.85 0.75 0.25", "0.49 0.75 0.25", "0.95 0.75 0.25", "0.5 0.75 0.25", long]
    guesses = cascade.sure_guesses(texts)
    assert [guess is None for guess in guesses] == [False, True, False, False, False]
    assert second.asked == [texts[0], texts[3], long], "long texts have a limit of their own"
    assert cascade.sure_guesses(texts[1:2]) == [None]
    never = Cascade(first, make_record(), 128, Cascade(second, make_record(short=None), 128))
    asked = len(second.asked)
    assert never.sure_guesses(texts[:1]) == [None]
    assert len(second.asked) == asked, "who is never believed is not asked"


def test_what_was_just_guessed_is_not_guessed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade_module, "REMEMBERED", 3)
    parrot = Parrot()
    cascade = Cascade(parrot, make_record(), 8)
    texts = ["0.1 0.8 0.2", "0.95 0.8 0.2", "0.2 0.3 0.7"]
    assert [guess is None for guess in cascade.quick_guesses(texts)] == [True, False, True]
    assert parrot.asked == texts
    guesses = cascade.guesses(texts, sure_only=False)
    assert parrot.asked == [*texts, texts[1]], "who was sure needed nobody else"
    assert [guess and guess.cluster for guess in guesses] == [0, 0, 1]
    cascade.guesses(texts[:1], sure_only=False)
    assert parrot.asked[4:] == texts[:1], "remembered for once"
    for number in range(20):
        cascade.quick_guesses([f"0.1 0.8 0.{number}"])
    assert len(cascade._unsure) <= 3


def test_two_guesses_are_one_estimate() -> None:
    def told(scores: list[float], clusters: list[int]) -> Guess:
        falling = np.array(scores, dtype=np.float32)
        return Guess(clusters[0], 0.5, scores[0], falling, np.array(clusters))

    first, second = told([0.8, 0.2], [7, 3]), told([0.5, 0.45, 0.1], [3, 7, 5])
    found = together(first, second)
    assert found.clusters.tolist() == [7, 3, 5]
    wanted = [0.75 * 0.45 + BLEND * 0.8, 0.75 * 0.5 + BLEND * 0.2, 0.75 * 0.1 + BLEND * 0.2]
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-6)
    assert (found.cluster, found.score) == (7, pytest.approx(wanted[0]))
    margin = (wanted[0] - wanted[1]) / TEMPERATURE
    assert found.confidence == pytest.approx(1 / (1 + np.exp(-margin)))


@pytest.mark.parametrize(
    "text", ["0.89 0.75 0.25", "0.95 0.49 0.25"], ids=["not confident", "perhaps nobody's"]
)
def test_the_rest_falls_through_to_the_embedder(text: str) -> None:
    router, _, embedder = make_router()
    assert router.quick_route(turns(text)) is None
    sure, unsure = router.route(["0.95 0.75 0.25", text])
    assert (sure.by, unsure.by) == ("student", "embedder")
    assert (sure.expert, unsure.expert) == ("expert-0000", "expert-0001")
    assert embedder.calls == [[text]]


def test_conversations_take_the_same_two_ways() -> None:
    router, _, embedder = make_router()
    routes = router.route_conversations([turns("0.1 1 0"), turns("0.95 0.75 0.25")])
    assert [route.by for route in routes] == ["embedder", "student"]
    assert embedder.calls == [["0.1 1 0"]]


def test_short_and_long_texts_have_limits_of_their_own() -> None:
    router, student, _ = make_router(make_record(short=0.99, long=0.5))
    text = "0.95 0.75 0.25"
    assert router.quick_route(turns(text)) is None
    assert router.quick_route(turns(text.ljust(SHORT_CHARACTERS + 1))) is not None
    router, student, _ = make_router(make_record(short=None, long=None))
    assert router.quick_route(turns("1 1 0")) is None
    assert student.asked == []


def test_of_a_long_text_the_student_sees_the_beginning_alone() -> None:
    router, student, _ = make_router(max_tokens=8)
    router.quick_route(turns("0.95 0.75 0.25".ljust(100_000)))
    router.route(["0.95 0.75 0.25".ljust(100_000)])
    assert [len(text) for text in student.asked] == [40, 40]


HOME = "0.95 0.9 0.6"


@pytest.mark.parametrize(
    ("opening", "text", "expert"),
    [
        (HOME, "0.95 0.8 0.6", "expert-0000"),
        (HOME, "0.95 0.6 0.9", "expert-0001"),  # ahead by 0.3
        (HOME, "0.95 0.6 0.7", "expert-0000"),  # by 0.1: stays
        (HOME, "0.95 0.6 0.78", None),  # by 0.18: too near to the margin to tell
        (HOME, "0.95 0.6 0.82", None),
        (HOME, "0.5 0.6 0.9", None),
        ("0.5 0.9 0.6", "0.95 0.6 0.9", None),
    ],
)
def test_a_sticky_conversation_needs_both_texts_sure(
    opening: str, text: str, expert: str | None
) -> None:
    router, _, _ = make_router()
    route = router.quick_route(turns(opening, text))
    assert (None if route is None else route.expert) == expert
    if expert == "expert-0000" and text != "0.95 0.8 0.6":
        assert route == router.quick_route(turns(opening))


def test_without_sticky_the_opening_is_not_looked_at() -> None:
    router, student, _ = make_router(sticky=False)
    assert router.quick_route(turns("0 1 0", "0.95 0.6 0.7")) is not None
    assert student.asked == ["0.95 0.6 0.7"]


def test_route_on_is_respected() -> None:
    router, student, _ = make_router(route_on="first_user")
    assert router.quick_route(turns("0.95 0.6 0.7", "0 1 0")) is not None
    assert student.asked == ["0.95 0.6 0.7"]


def test_a_conversation_without_text_is_refused() -> None:
    router, _, _ = make_router()
    with pytest.raises(UnroutableError):
        router.quick_route([])


def test_a_cluster_that_the_guess_leaves_out_leads_nobody() -> None:
    cascade = Cascade(Parrot(), make_record(), 128)
    guess = Guess(0, 1.0, 1.0, np.ones(1, np.float32), np.zeros(1, np.int64))
    assert cascade.leads(guess, 1, 0.1) is None
