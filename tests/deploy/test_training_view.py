import io
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from configs.manifest import ExpertCard
from deploy.training_view import TrainingView
from expert_trainer.types import (
    ActorLost,
    ActorUp,
    ExpertFailed,
    ExpertFinished,
    ExpertProgress,
    ExpertReused,
    ExpertStarted,
    PoolEnded,
    PoolStarted,
)

Cards = Callable[..., ExpertCard]


def test_a_log_has_a_line_per_end_and_a_summary_now_and_then(
    clock: Any, make_card: Cards, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingView(clock=clock) as view:
        for index in range(200):
            name = f"expert-{index:04d}"
            view(ExpertReused(name, make_card(name)))
        view(PoolStarted(30, 2, 3000))
        view(ActorUp("trainer-t-0.1", "host", "cpu", 1))
        for index in range(30):
            name = f"expert-{1000 + index}"
            view(ExpertStarted(name, "trainer-t-0.1", 100, 1))
            for step in range(0, 100, 5):
                clock.now += 0.05
                view(ExpertProgress(name, "trainer-t-0.1", step, 100, 2.0, step * 10, 100.0))
            view(ExpertFinished(name, make_card(name)))
        view(ExpertFailed("expert-2000", "the loss is not finite", 3, final=True))
        view(ActorLost("trainer-t-0.1", "SIGKILL"))
        view(PoolEnded(30.0, 29.0))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0].strip() == "200 finished in an earlier run are reused"
    assert lines[1].strip() == "30 to do on 2 actors …"
    assert sum("admitted after" in line for line in lines) == 30
    assert sum("tokens/s" in line for line in lines) == 4, "every 10 s and the end"
    assert any("given up: the loss is not finite" in line for line in lines)
    assert any("actor trainer-0.1 on host lost: SIGKILL" in line for line in lines)
    assert len(lines) == 2 + 30 + 4 + 2


def test_a_run_with_nothing_to_do_says_so(
    make_card: Cards, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingView() as view:
        view(ExpertReused("expert-0001", make_card("expert-0001")))
    assert capsys.readouterr().err.strip() == "1 finished in an earlier run is reused"


def test_failures_stand_above_the_live_view(crowd: list[Any], make_card: Cards) -> None:
    terminal = io.StringIO()
    console = Console(
        file=terminal, force_terminal=True, width=100, height=30, _environ={"TERM": "xterm"}
    )
    with TrainingView(console=console) as view:
        for event in crowd:
            view(event)
        view(ExpertFailed("expert-0000", "disk [full]", 1, final=False))
        view(ExpertFinished("expert-0001", make_card("expert-0001")))
    shown = terminal.getvalue()
    assert "expert-0000 failed on trainer-0.1, try 1, to be tried again: disk [full]" in shown
    assert "… and 41 more actors" in shown
    assert "admitted after" not in shown, "hundreds of these would push the failures away"


def test_drawing_and_events_do_not_wait_for_each_other(crowd: list[Any]) -> None:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=100, height=30, _environ={"TERM": "xterm"}
    )
    with TrainingView(console=console) as view:
        for event in crowd:
            view(event)
        stop = threading.Event()

        def redraw() -> None:
            # The pause lets the others have the terminal's lock, which is not a fair one.
            while not stop.wait(0.0005):
                assert view._live is not None
                view._live.refresh()

        drawing = threading.Thread(target=redraw, daemon=True)
        drawing.start()
        try:
            for attempt in range(100):
                view(ExpertFailed("expert-0002", "again", attempt, final=False))
                view(ExpertStarted("expert-0002", "trainer-a1b2c3-1.1", 100, attempt + 1))
        finally:
            stop.set()
            drawing.join(timeout=60)
        assert not drawing.is_alive()


@pytest.mark.parametrize("forced", [False, True], ids=["plain", "colour-forced"])
def test_results_reach_a_pipe_while_the_view_is_on_a_terminal(forced: bool) -> None:
    program = (
        "from deploy.output import say\n"
        "from deploy.training_view import TrainingView\n"
        "from expert_trainer.types import PoolStarted\n"
        "with TrainingView() as view:\n"
        "    view(PoolStarted(1, 1, 1))\n"
        "    say('{}')\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"} | ({"FORCE_COLOR": "1"} if forced else {})
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
        text=True,
        timeout=60,
    )
    os.close(theirs)
    assert done.stdout == "{}\n"
    assert b"0 of 1 done" in os.read(ours, 65536)
    os.close(ours)


def test_a_log_with_forced_colours_is_still_a_log() -> None:
    program = (
        "from deploy.training_view import TrainingView\n"
        "from expert_trainer.types import PoolStarted\n"
        "with TrainingView() as view:\n"
        "    view(PoolStarted(1, 1, 1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        env=os.environ | {"FORCE_COLOR": "1"},
        text=True,
        timeout=60,
    )
    assert done.stderr == "  1 to do on 1 actor …\n"
