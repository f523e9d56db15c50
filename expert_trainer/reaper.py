"""Ends what a killed driver leaves behind: a process of its own that outlives it for a moment.

    python -m expert_trainer.reaper DIRECTORY PID:CREATED ...

It waits until its standard input closes, as it does when the driver is gone, however that came
about; then it ends the processes and removes the directory. Ray's own processes end with their
driver, but for two agents that would try for a minute to report to a server that is gone.

Knows nothing of Ray.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

GRACE_S = 3.0
"""Seconds for processes to end by themselves, as most do."""


@contextmanager
def reaper(directory: str, processes: Iterable[psutil.Process]) -> Iterator[None]:
    """Have the processes ended and the directory removed if this process dies in the context."""
    known = [f"{process.pid}:{process.create_time()!r}" for process in processes]
    child = subprocess.Popen(
        [sys.executable, "-m", "expert_trainer.reaper", directory, *known],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
        start_new_session=True,  # a Ctrl-C is for the driver alone
    )
    try:
        yield
    finally:
        child.kill()
        child.communicate()


def main(directory: str, known: Iterable[str]) -> None:
    """Wait for the end of standard input, then clean up."""
    processes = []
    for pid, created in (text.split(":") for text in known):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):
                processes.append(process)
    sys.stdin.buffer.read()
    _, alive = psutil.wait_procs(processes, timeout=GRACE_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
