from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.manifest import ExpertCard
from deploy.training_state import Counts
from deploy.training_words import counted, duration, failed, finished, lost, members, short_name
from expert_trainer.types import ActorLost, ExpertFailed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3_599, "0:59:59"), (100_000, "27:46:40")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_failed_and_reused_are_told_where_there_are_any() -> None:
    assert counted(Counts(5000, 1, 64, 4935, 0, 0)) == "1 of 5,000 done, 64 running, 4,935 queued"
    assert counted(Counts(9, 1, 2, 3, 2, 1)).endswith("3 queued, 2 failed, 1 reused")


def test_a_failure_says_where_what_follows_and_why() -> None:
    event = ExpertFailed("expert-0003", "disk\n full", 2, final=False)
    assert failed(event, "trainer-a1b2c3-4.2") == (
        "expert-0003 failed on trainer-4.2, try 2, to be tried again: disk full"
    )
    assert "given up" in failed(ExpertFailed("x", "c", 3, final=True), None)


def test_a_cause_of_a_thousand_lines_is_one_line() -> None:
    text = lost(ActorLost("trainer-a1b2c3-4.2", "line\n" * 1000), "node-1")
    assert text.startswith("actor trainer-4.2 on node-1 lost: line line")
    assert text.endswith("…")
    assert len(text) < 500


def test_an_expert_that_stopped_early_says_so(make_card: Callable[..., ExpertCard]) -> None:
    assert finished(make_card(stopped_early=True)).endswith(
        "1,000 tokens in 10 steps, stopped early"
    )
    assert "held back after 0:00:41" in finished(make_card(state="held_back"))


def test_names_of_actors_lose_the_tag_alone() -> None:
    assert short_name("trainer-a1b2c3-12.3") == "trainer-12.3"
    assert short_name("trainer") == "trainer"


def test_members_share_their_beginning() -> None:
    ids = [f"expert-{index:04d}" for index in range(8)]
    assert members(ids[:1], 5) == "expert-0000"
    assert members(ids, 26) == "expert-0000, 0001, 0002 +5"
    assert members(ids, 200) == "expert-0000, 0001, 0002, 0003, 0004, 0005, 0006, 0007"
    assert members(["measure base", "single-lr"], 40) == "measure base, single-lr"


@given(st.integers(1, 40), st.integers(20, 80))
def test_members_fit_and_none_is_forgotten(count: int, width: int) -> None:
    text = members([f"expert-{index:04d}" for index in range(count)], width)
    names, _, more = text.partition(" +")
    assert len(text) <= width
    assert len(names.split(", ")) + int(more or 0) == count
