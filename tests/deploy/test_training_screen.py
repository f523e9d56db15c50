import io
from typing import Any

import pytest
from rich.console import Console

from deploy.training_pool import Training
from deploy.training_screen import busiest, draw
from deploy.training_state import Actor, TrainingState
from expert_trainer.types import ActorUp, ExpertFailed, ExpertStarted, PoolStarted


def render(state: TrainingState, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), record=True, width=width, height=height)
    console.print(draw(state, "training", width=width, height=height))
    return console.export_text().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (200, 60), (200, 90)])
def test_it_fits_the_terminal_and_every_actor_is_accounted_for(
    width: int, height: int, crowd: list[Any], clock: Any
) -> None:
    state = TrainingState(clock)
    for event in crowd:
        state(event)
    lines = render(state, width, height)
    assert len(lines) < height
    assert all(len(line) <= width for line in lines)
    assert not any("…" in line for line in lines[:-1]), "nothing is cut off"
    rows = [line for line in lines if line.startswith("trainer-")]
    hidden = 64 - len(rows)
    if hidden:
        assert f"… and {hidden} more actors, 1 of them waiting" in lines[-1]
        assert not any("waits" in row for row in rows)
    else:
        assert "waits" in rows[-1]
    assert lines[-1].endswith("2 actors are starting")


def test_the_header_tells_where_the_run_stands(crowd: list[Any], clock: Any) -> None:
    state = TrainingState(clock)
    for event in crowd:
        clock.now += 0.1
        state(event)
    state(ExpertFailed("expert-0000", "nan", 3, final=True))
    first, second = render(state, 100, 30)[1:3]
    assert first.startswith("training")
    assert "gone, about " in first
    assert "0 of 500 done, 125 running, 374 queued, 1 failed" in second
    assert "tokens/s" in second


def test_a_cohort_is_one_row(clock: Any) -> None:
    state = TrainingState(clock)
    state(PoolStarted(3, 1, 60))
    state(ActorUp("trainer-a1b2c3-0.1", "host", "cores:0-1", 1))
    for index, steps in enumerate((10, 30, 20)):
        state(ExpertStarted(f"expert-{index:04d}", "trainer-a1b2c3-0.1", steps, 1))
    row = render(state, 120, 30)[-1]
    assert " ".join(row.split()) == ("trainer-0.1 cores:0-1 expert-0000, 0001, 0002 0/30 – – –"), (
        "the longest member's steps; one node has no column"
    )


def test_before_the_first_pool_there_is_nothing_to_see(clock: Any) -> None:
    assert [line.strip() for line in render(TrainingState(clock), 100, 30)] in ([], [""])


def test_the_busiest_are_those_with_most_left_in_the_order_of_their_names() -> None:
    actors = []
    for index, steps in enumerate([5, 0, 9, 7, 1, 2, 3, 4, 6, 8, 10]):
        actor = Actor(f"trainer-tag-{index}.1", "n", "cpu")
        if steps:
            actor.training["x"] = Training("x", actor.name, 1, steps, 0.0)
        actors.append(actor)
    assert [actor.name for actor in busiest(actors, 3)] == [
        f"trainer-tag-{index}.1" for index in (2, 9, 10)
    ]


def test_what_is_drawn_does_not_change_with_the_state(crowd: list[Any], clock: Any) -> None:
    """The drawing thread renders what it was given while events go on."""
    state = TrainingState(clock)
    for event in crowd:
        state(event)
    drawn = draw(state, "training", width=100, height=30)
    state.actors.clear()
    console = Console(file=io.StringIO(), record=True, width=100, height=30)
    console.print(drawn)
    assert "trainer-0.1" in console.export_text()
