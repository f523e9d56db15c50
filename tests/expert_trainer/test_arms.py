import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_trainer.arms import headroom_closed, losses_by_arm, perplexities, routing_regret

TOKENS = np.array([2.0, 4.0])
LOSSES = {
    "base": np.array([[4.0, 2], [8.0, 4]]),
    "a": np.array([[2.0, 2], [9.0, 4]]),
    "b": np.array([[5.0, 2], [6.0, 4]]),
    "single": np.array([[3.0, 2], [7.0, 4]]),
}


def test_each_arm_takes_its_choice_of_every_document() -> None:
    nats = losses_by_arm(LOSSES, ["a", "b"], [0, None], seed=1)
    assert nats["base"].tolist() == [4, 8]
    assert nats["routed"].tolist() == [2, 8]
    assert nats["hindsight"].tolist() == [2, 6]
    assert nats["single"].tolist() == [3, 7]
    assert 2 <= nats["random"][0] <= 5
    assert 6 <= nats["random"][1] <= 9
    assert headroom_closed(nats) == pytest.approx(50)


def test_regret_is_what_other_choices_cost_per_token() -> None:
    served = ["a", "b"]
    assert routing_regret(LOSSES, served, [0, 1], [0, 1]) == 0
    assert routing_regret(LOSSES, served, [1, 1], [0, 1]) == pytest.approx((5 - 2) / 6)
    assert routing_regret(LOSSES, served, [None, 1], [0, 1]) == pytest.approx((4 - 2) / 6)
    assert routing_regret(LOSSES, served, [0, 1], [1, 0]) == pytest.approx((2 - 5 + 6 - 9) / 6)


def test_perplexity_is_weighted_by_tokens() -> None:
    nats = losses_by_arm(LOSSES, ["a", "b"], [0, 1], seed=1)
    both = perplexities(nats, TOKENS, np.array([True, True]))
    assert both.routed == pytest.approx(math.exp(8 / 6))
    assert (both.documents, both.tokens) == (2, 6)
    first = perplexities(nats, TOKENS, np.array([True, False]))
    assert first.base == pytest.approx(math.exp(2))
    assert first.single == pytest.approx(math.exp(1.5))


def test_without_experts_everything_is_the_base() -> None:
    nats = losses_by_arm({"base": LOSSES["base"]}, [], [None, None], seed=1)
    assert all(np.array_equal(each, [4, 8]) for each in nats.values())
    assert headroom_closed(nats) is None
    assert perplexities(nats, TOKENS, np.array([True, True])).single is None


@given(
    losses=st.lists(st.tuples(*[st.floats(0, 50)] * 3), min_size=1, max_size=6),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_no_choice_beats_hindsight(
    losses: list[tuple[float, ...]], seed: int, data: st.DataObject
) -> None:
    columns = np.array(losses).T
    table = {
        arm: np.stack([column, np.ones_like(column)], axis=1)
        for arm, column in zip(("base", "a", "b"), columns, strict=True)
    }
    choice = st.sampled_from([None, 0, 1])
    choices = data.draw(st.lists(choice, min_size=len(losses), max_size=len(losses)))
    nats = losses_by_arm(table, ["a", "b"], choices, seed=seed)
    for arm in ("base", "routed", "random"):
        assert (nats["hindsight"] <= nats[arm] + 1e-9).all()
    closed = headroom_closed(nats)
    assert closed is None or closed <= 100 + 1e-9
