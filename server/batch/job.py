"""One batch job from its inputs to its outputs; killed at any moment, the same job goes on.

    inputs ──► intake ──► ledger ──► dispatcher ──► ledger ──► outputs
               (routed)               (answered, grouped by expert)

Knows nothing of who answers, of a command line, or of HTTP.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from expert_trainer.storage import is_url
from server.batch.dispatch import LOOK_S, Dispatcher
from server.batch.errors import BatchError
from server.batch.intake import Intake
from server.batch.ledger import Ledger
from server.batch.outputs import check_outputs, write_output
from server.batch.results import split_target
from server.batch.rows import input_files
from server.batch.types import Backend, Counts, JobSpec, Phase

SPEC = "spec"
STARTED = "started"


async def run_job(
    spec: JobSpec,
    backend: Backend,
    listener: Callable[[Counts], None],
    cancelled: asyncio.Event | None = None,
) -> Counts:
    """Answer every line of the inputs once, in the output or among the errors.

    Args:
        spec: what is to be done; a job that was interrupted goes on with the same one.
        backend: who answers.
        listener: told where the job stands, several times a second.
        cancelled: once it is set, what is finished is written and the job is over.

    Returns:
        Where it stood in the end.

    Raises:
        BatchError: it cannot be done, or not go on now; what is finished stays in the ledger.
    """
    files = check_job(spec)
    cancelled = cancelled or asyncio.Event()
    with Ledger(spec.work) as ledger:
        _claim(ledger, spec, files)
        counts = await _Run(spec, files, ledger, backend, listener).run(cancelled)
    shutil.rmtree(spec.work, ignore_errors=True)
    return counts


def check_job(spec: JobSpec) -> list[str]:
    """Find out before anything is started whether the job can be done; its input files in order.

    Raises:
        BatchInputError: an input is not there.
        BatchOutputError: an output cannot be written, or the disk has no room.
    """
    files = input_files(spec.inputs)
    check_outputs((spec.output, spec.errors), spec.work, _bytes(files))
    return files


def write_finished(spec: JobSpec) -> Counts | None:
    """Write what a job that will not go on has finished; none where it has not begun.

    Its ledger stays.

    Raises:
        BatchError: it cannot be read, or the outputs not be written.
    """
    if not has_begun(spec.work):
        return None
    with Ledger(spec.work) as ledger:
        _write(spec, ledger)
        return Counts(*ledger.counts())


def has_begun(work: Path) -> bool:
    """Whether a job in that work directory was interrupted."""
    return (work / "ledger.sqlite").is_file()


class _Run:
    """One run of a job, which may have run before."""

    def __init__(
        self,
        spec: JobSpec,
        files: Sequence[str],
        ledger: Ledger,
        backend: Backend,
        listener: Callable[[Counts], None],
    ) -> None:
        self._spec = spec
        self._ledger = ledger
        self._listener = listener
        self._intake = Intake(spec, files, ledger, backend)
        self._backend = backend
        self._finished_before = self._intake.done + self._intake.failed
        self._dispatcher: Dispatcher | None = None
        self._totals: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._phase: Phase = "reading"
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    async def run(self, cancelled: asyncio.Event) -> Counts:
        """All phases; what is done already is not done again."""
        with self._timed("reading"):
            await self._intake.run(self._tell, cancelled)
        with self._timed("starting"):
            while self._ledger.remaining() and not (self._backend.seats or cancelled.is_set()):
                await self._backend.refresh(self._ledger.remaining())
                await asyncio.sleep(LOOK_S)
        with self._timed("answering"):
            if not cancelled.is_set():
                self._totals, self._left = self._ledger.totals(), self._ledger.remaining()
                self._dispatcher = Dispatcher(
                    self._ledger, self._backend, self._tell, self._intake.where
                )
                await self._dispatcher.run(cancelled)
        with self._timed("writing"):
            _write(self._spec, self._ledger)
        self._phase = "done"
        self._tell()
        return self._counts()

    @contextmanager
    def _timed(self, phase: Phase) -> Iterator[None]:
        self._phase, self._began = phase, time.perf_counter()
        self._tell()
        try:
            yield
        finally:
            self._seconds[phase] = time.perf_counter() - self._began

    def _tell(self) -> None:
        self._listener(self._counts())

    def _counts(self) -> Counts:
        intake, dispatcher = self._intake, self._dispatcher
        seconds = dict(self._seconds)
        if self._phase != "done":
            seconds.setdefault(self._phase, time.perf_counter() - self._began)
        return Counts(
            total=intake.lines,
            done=intake.done + (dispatcher.done if dispatcher else 0),
            failed=intake.failed + (dispatcher.failed if dispatcher else 0),
            phase=self._phase,
            tokens=dispatcher.tokens if dispatcher else 0,
            experts=self._experts(),
            finished_before=self._finished_before,
            seconds=seconds,
        )

    def _experts(self) -> dict[str, tuple[int, int]]:
        if self._dispatcher is None:
            return {}
        found: dict[str, tuple[int, int]] = {}
        for target, total in self._totals.items():
            expert, _ = split_target(target)
            done = total - self._left.get(target, 0) + self._dispatcher.by_target.get(target, 0)
            before = found.get(expert, (0, 0))
            found[expert] = (before[0] + done, before[1] + total)
        return found


def _write(spec: JobSpec, ledger: Ledger) -> None:
    write_output(spec.output, ledger.contents(ok=True, in_order=spec.in_order), spec.work)
    write_output(spec.errors, ledger.contents(ok=False, in_order=True), spec.work)


def _claim(ledger: Ledger, spec: JobSpec, files: Sequence[str]) -> None:
    """See that the ledger is this job's, or make it so.

    Raises:
        BatchError: it is another's.
    """
    mine = msgspec.json.encode(
        {
            "files": [[name, _size(name)] for name in files],
            "endpoint": spec.endpoint,
            "defaults": dict(spec.defaults),
        },
        order="deterministic",
    ).decode()
    theirs = ledger.fact(SPEC)
    if theirs is None:
        ledger.note(**{SPEC: mine, STARTED: str(int(time.time()))})
    elif theirs != mine:
        raise BatchError(
            f"an interrupted batch with other inputs or defaults has its ledger in {spec.work}; "
            "give its own command to go on with it, or remove that directory to begin anew"
        )


def _size(name: str) -> int:
    """Bytes of a file; of one behind a URL nobody is asked."""
    return 0 if is_url(name) else Path(name).stat().st_size


def _bytes(files: Sequence[str]) -> int:
    return sum(map(_size, files))
