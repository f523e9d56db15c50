import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_trainer.gate import judge

losses = st.floats(0, 20)


@given(base=losses, expert=losses, margin=st.floats(-1, 1))
def test_admitted_exactly_when_better_by_the_margin(
    base: float, expert: float, margin: float
) -> None:
    assert (judge(base, expert, margin).state == "admitted") == (base - expert > margin)


def test_an_equal_expert_is_held_back() -> None:
    assert judge(2.0, 2.0, 0.0).state == "held_back"


@pytest.mark.parametrize(("base", "expert"), [(None, None), (None, 1.0), (1.0, None)])
def test_what_nobody_measured_is_held_back(base: float | None, expert: float | None) -> None:
    verdict = judge(base, expert, -10.0)
    assert verdict.state == "held_back"
    assert "no held-out text" in verdict.reason


def test_the_reason_tells_the_figures() -> None:
    assert "2.5000 against the base's 2.4000" in judge(2.4, 2.5, 0.0).reason
