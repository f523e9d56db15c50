"""Asking all lines that are left, from as many seats as there are, until each is over.

A seat takes lines, expert by expert, asks them, notes what comes back, and takes more. Lines that
come back without an answer are asked again; one that keeps taking engines along is asked alone, and
given up in the end. Knows nothing of who answers, or of where results are written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from server.batch.backlog import SUSPECT, Backlog
from server.batch.errors import LaneLostError, LineError
from server.batch.ledger import Ledger, Result
from server.batch.results import OK, answer_line, fault_line, refused_line
from server.batch.types import Answer, Backend, Line, Seat
from server.gateway.usage import TAIL_BYTES, read_usage

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""Between two looks around, and between two writes to the ledger."""
PAUSE_S = 0.2
"""Of a seat for which there is nothing to do now."""
LONGEST_PAUSE_S = 5.0
MOST_LOSSES = 6
"""Times that whoever is asked may go away with a line; then the line is given up."""
UNWRITTEN = 1024
"""Results that are in memory at the most before they are written."""


class Dispatcher:
    """The answering of one job."""

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        tell: Callable[[], None],
        where: Callable[[int, int], dict[str, object]],
    ) -> None:
        """Describe it.

        Args:
            ledger: whose pending lines are to be answered.
            backend: who answers.
            tell: called after each write to the ledger.
            where: file and line to what output lines say of them.
        """
        self._ledger = ledger
        self._backend = backend
        self._tell = tell
        self._where = where
        self.backlog = Backlog(ledger)
        self._results: list[Result] = []
        self._alone: dict[str, asyncio.Lock] = {}
        self._in_lane: dict[str, int] = {}
        self._seats: dict[Seat, list[asyncio.Task[None]]] = {}
        self.done = 0
        self.failed = 0
        self.tokens = 0
        self.by_target: dict[str, int] = {}

    async def run(self, cancelled: asyncio.Event) -> None:
        """Ask until nothing is left, or until it is cancelled; what is in hand then is lost.

        Raises:
            BatchError: nobody will ever answer, or the ledger cannot be written.
        """
        try:
            while not (self.backlog.over or cancelled.is_set()):
                await self._look()
                self._write()
                await self._pause(cancelled)
        finally:
            tasks = [task for tasks in self._seats.values() for task in tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._write()

    async def _pause(self, cancelled: asyncio.Event) -> None:
        """Until the next look, or until all is over."""
        for _ in range(10):
            if self.backlog.over or cancelled.is_set() or len(self._results) > UNWRITTEN:
                return
            await asyncio.sleep(LOOK_S / 10)

    async def _look(self) -> None:
        """See who is there to answer, and whether the seats are well."""
        hopeless = await self._backend.refresh(self.backlog.remaining())
        for target, reason in hopeless.items():
            for line in self.backlog.drop(target):
                self._fail(line, LineError("expert_refused", reason))
        wanted = list(self._backend.seats)
        counts = {seat: wanted.count(seat) for seat in dict.fromkeys(wanted)}
        for seat, number in counts.items():
            tasks = self._seats.setdefault(seat, [])
            for task in [task for task in tasks if task.done()]:
                tasks.remove(task)
                task.result()  # a fault of our own: let whoever runs the job see it
            while len(tasks) < number:
                tasks.append(asyncio.create_task(self._sit(seat)))
        for seat in self._seats.keys() - counts.keys():
            for task in self._seats.pop(seat):
                task.cancel()

    async def _sit(self, seat: Seat) -> None:
        """Take lines and ask them, for ever."""
        lock = self._alone.setdefault(seat.lane, asyncio.Lock())
        pause = PAUSE_S
        while True:
            async with lock:  # nobody takes lines while suspects are asked
                lines = self.backlog.take(seat.group, self._backend.holds(seat.lane), seat.block)
                if alone := bool(lines) and lines[0].losses >= SUSPECT:
                    answered = await self._ask_alone(seat, lines)
            if not lines:
                await asyncio.sleep(pause)
                continue
            if not alone:
                answered = await self._ask(seat, lines)
            pause = PAUSE_S if answered else min(2 * pause, LONGEST_PAUSE_S)
            if not answered:
                await asyncio.sleep(pause)

    async def _ask_alone(self, seat: Seat, lines: Sequence[Line]) -> bool:
        try:
            while self._in_lane.get(seat.lane):  # noqa: ASYNC110 - one in a thousand jobs
                await asyncio.sleep(PAUSE_S)
        except asyncio.CancelledError:
            for line in lines:
                self.backlog.give_back(line)
            raise
        return await self._ask(seat, lines)

    async def _ask(self, seat: Seat, lines: Sequence[Line]) -> bool:
        """Ask some lines and note what comes back; whether any answer came."""
        left = {line.number: line for line in lines}
        answered = False
        self._in_lane[seat.lane] = self._in_lane.get(seat.lane, 0) + 1
        try:
            async for answer in self._backend.ask(seat.lane, lines):
                line = left.pop(answer.number)
                if answer.again:
                    self.backlog.give_back(line)
                else:
                    answered = True
                    self._note(line, answer)
        except LaneLostError as lost:
            logger.info("%s went away with %d lines: %s", seat.lane, len(left), lost)
            if lost.reached:  # an engine may be away for long before anybody knows
                for line in left.values():
                    line.losses += 1
        finally:
            self._in_lane[seat.lane] -= 1
            for line in left.values():
                if line.losses >= MOST_LOSSES:
                    self.backlog.done()
                    self._fail(
                        line,
                        LineError(
                            "engine_lost",
                            f"{line.losses} times the engine went away while it had this line, at "
                            "last with nothing else; its log tells more",
                        ),
                    )
                else:
                    self.backlog.give_back(line)
        return answered

    def _note(self, line: Line, answer: Answer) -> None:
        self.backlog.done()
        where = self._where(line.file, line.line)
        if answer.status == OK:
            self.done += 1
            self.by_target[line.target] = self.by_target.get(line.target, 0) + 1
            _, generated = read_usage(answer.body[-TAIL_BYTES:])
            self.tokens += generated or 0
            self._results.append(Result(line.number, True, answer_line(line, answer, where)))
        else:
            self.failed += 1
            self._results.append(Result(line.number, False, refused_line(line, answer, where)))

    def _fail(self, line: Line, error: LineError) -> None:
        self.failed += 1
        content = fault_line(line.number, line.custom_id, error, self._where(line.file, line.line))
        self._results.append(Result(line.number, False, content))

    def _write(self) -> None:
        results, self._results = self._results, []
        if results:
            self._ledger.finish(results)
        self._tell()
