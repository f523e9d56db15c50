from collections.abc import Callable
from typing import Any

from configs.manifest import ExpertCard
from deploy.training_report import EXTREMES, MAX_ROWS, describe, gain
from deploy.training_state import TrainingState
from expert_trainer.training import Failure, TrainSummary
from expert_trainer.types import ExpertFailed, ExpertStarted, PoolEnded, PoolStarted

Cards = Callable[..., ExpertCard]


def summary_of(trained: list[str], failed: list[Failure] | None = None) -> TrainSummary:
    return TrainSummary.model_construct(
        bundle="b",
        version="v",
        admitted=trained,
        held_back=[],
        failed=failed or [],
        trained=trained,
        tokens_seen=1000,
        seconds=60.0,
    )


def test_a_few_experts_have_a_row_each(make_card: Cards, clock: Any) -> None:
    cards = [
        make_card("expert-0002", stopped_early=True),
        make_card("expert-0001", heldout_loss_base=None, heldout_loss_expert=None),
        make_card("expert-0003", state="held_back", heldout_loss_expert=3.3),
    ]
    summary = summary_of(["expert-0002", "expert-0003"], [Failure(id="expert-0004", cause="nan")])
    lines = describe(summary, cards, TrainingState(clock)).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["expert-0001", "expert-0002", "expert-0003"]
    assert "reused" in lines[2]
    assert "–" in lines[2]
    assert "10*" in lines[3]
    assert "3.000" in lines[3]
    assert "2.700" in lines[3]
    assert "10.00" in lines[3]
    assert "-10.00  held back" in lines[4]
    assert "* stopped early: its held-out loss no longer fell" in lines
    assert "expert-0004 failed: nan" in lines
    assert "3 experts: 2 admitted, 1 held back, 1 stopped early; gain 0.0% in the median" in (
        "\n".join(lines)
    )


def test_of_many_only_the_extremes_and_those_held_back(make_card: Cards, clock: Any) -> None:
    count = 5 * MAX_ROWS
    cards = [
        make_card(
            f"expert-{index:04d}",
            heldout_loss_expert=3.0 - index / count,
            state="held_back" if index in (0, 100) else "admitted",
        )
        for index in range(count)
    ]
    lines = describe(summary_of([]), cards, TrainingState(clock)).splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("expert-")]
    least = [card.id for card in cards[:EXTREMES]]
    most = [card.id for card in cards[-EXTREMES:]][::-1]
    assert shown == [*least, *most, "expert-0100"], "none is shown twice"
    assert f"the {EXTREMES} that gained most:" in lines


def test_totals_tell_speed_business_and_the_cost_of_failures(make_card: Cards, clock: Any) -> None:
    state = TrainingState(clock)
    for event in (
        PoolStarted(1, 1, 10),
        ExpertStarted("x", "a", 10, 1),
        ExpertFailed("x", "nan", 1, final=False),
        PoolEnded(50.0, 45.0),
    ):
        state(event)
    state.tokens_trained, state.tokens_wasted = 6_000, 600
    text = describe(summary_of(["x"]), [make_card("x")], state)
    assert "1 trained now in 0:01:00: 60 experts an hour, 100 tokens/s" in text
    assert "actors computing 90.0% of their time" in text
    assert "1 try was repeated; failures cost 600 tokens of training, 10.0% of all" in text


def test_nothing_trained_is_no_division_by_zero(clock: Any) -> None:
    assert describe(summary_of([]), [], TrainingState(clock)) == "0 trained now in 0:01:00"


def test_gain_is_relative_to_the_base(make_card: Cards) -> None:
    assert gain(make_card(heldout_loss_base=None)) is None
    assert gain(make_card(heldout_loss_base=4.0, heldout_loss_expert=3.0)) == 25.0
