import os
import pty
import subprocess
import sys

import pytest

from deploy.progress import StageBar

PROGRAM = (
    "from deploy.output import say\n"
    "from deploy.progress import StageBar\n"
    "with StageBar() as bar:\n"
    "    bar('reading', 1, 10)\n"
    "    bar.detail('reading', 'two files')\n"
    "    say('result')\n"
)


def test_a_log_has_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with StageBar() as bar:
        for done in range(100):
            bar("reading", done, 100)
            bar.detail("reading", "…")
        bar("clustering", 1, 1)
    assert capsys.readouterr().err == "  reading …\n  clustering …\n"


def test_a_terminal_has_bars_and_a_pipe_the_results() -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=True,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        text=True,
        timeout=60,
    )
    os.close(theirs)
    assert done.stdout == "result\n"
    shown = os.read(ours, 65536)
    assert b"reading" in shown
    assert b"two files" in shown
    os.close(ours)
