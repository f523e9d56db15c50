"""Reading a job's input into its ledger: rows to requests, requests to whoever is to answer.

Block by block, so that memory does not grow; a block enters the ledger together with how far the
input has been read. Knows nothing of how anything is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from server.batch.errors import LineError
from server.batch.ledger import Entry, Ledger
from server.batch.requests import parse_request
from server.batch.results import answer_line, fault_line
from server.batch.rows import InputRow, read_input
from server.batch.types import Answer, Backend, Decision, JobSpec, Line, Task

BLOCK_ROWS = 512
"""Rows that are routed and written together."""
CURSOR = "read_to"
COMPLETE = "read"

Where = Callable[[int, int], dict[str, object]]
"""File number and line number to what output lines say of them."""


class Intake:
    """The reading of one job's input."""

    def __init__(
        self, spec: JobSpec, files: Sequence[str], ledger: Ledger, backend: Backend
    ) -> None:
        self._spec = spec
        self._files = files
        self._ledger = ledger
        self._backend = backend
        self.lines, self.done, self.failed = ledger.counts()
        """Read so far; answered and refused among them."""

    @property
    def complete(self) -> bool:
        """Whether all of the input is in the ledger."""
        return self._ledger.fact(COMPLETE) is not None

    async def run(self, tell: Callable[[], None], cancelled: asyncio.Event) -> None:
        """Read what is left of the input.

        Raises:
            BatchError: it cannot be read, or nobody can tell who is to answer.
        """
        if self.complete:
            return
        cursor = self._ledger.fact(CURSOR)
        file, _, line = (cursor or "0:0").partition(":")
        rows = read_input(self._files, (int(file), int(line)))
        while not cancelled.is_set() and (block := await asyncio.to_thread(_next_block, rows)):
            entries = await self._entries(block)
            last = block[-1]
            self._ledger.add(entries, **{CURSOR: f"{last.file}:{last.line}"})
            self.lines += len(entries)
            self.done += sum(e.result is not None and e.result[0] for e in entries)
            self.failed += sum(e.result is not None and not e.result[0] for e in entries)
            tell()
        if not cancelled.is_set():
            self._ledger.note(**{COMPLETE: "yes"})

    def where(self, file: int, line: int) -> dict[str, object]:
        """What output lines say of a place in the input."""
        return {"file": self._files[file], "line": line}

    async def _entries(self, rows: Sequence[InputRow]) -> list[Entry]:
        """What becomes of each row."""
        parsed = await asyncio.to_thread(lambda: [self._parsed(row) for row in rows])
        known = self._ledger.known_ids([t.custom_id for t in parsed if isinstance(t, Task)])
        for place, (task, row) in enumerate(zip(parsed, rows, strict=True)):
            if isinstance(task, LineError):
                continue
            first = known.setdefault(task.custom_id, (row.file, row.line))
            if first != (row.file, row.line):
                parsed[place] = LineError(
                    "duplicate_custom_id",
                    f"custom_id {task.custom_id[:100]!r} is that of {self._files[first[0]]}:"
                    f"{first[1]} already; that line is answered, this one is not",
                )
        tasks = [task for task in parsed if isinstance(task, Task)]
        decisions = iter(await self._backend.decide(tasks) if tasks else ())
        entries = []
        for place, (task, row) in enumerate(zip(parsed, rows, strict=True)):
            number = self.lines + place + 1
            if isinstance(task, LineError):
                entries.append(self._fault(number, row, None, task))
                continue
            decision = next(decisions)
            if isinstance(decision, LineError):
                entries.append(self._fault(number, row, task.custom_id, decision))
            else:
                entries.append(self._asked(number, row, task, decision))
        return entries

    def _parsed(self, row: InputRow) -> Task | LineError:
        if row.fields is None:
            return LineError(row.code, row.fault)
        place = f"line-{row.line}" if len(self._files) == 1 else f"line-{row.file + 1}-{row.line}"
        try:
            return parse_request(
                row.fields,
                place=place,
                defaults=self._spec.defaults,
                endpoint=self._spec.endpoint,
            )
        except LineError as error:
            return error

    def _asked(self, number: int, row: InputRow, task: Task, decision: Decision) -> Entry:
        result = None
        if decision.answer is not None:
            line = Line(
                number,
                row.file,
                row.line,
                task.custom_id,
                task.path,
                decision.target,
                b"",
                decision.score,
            )
            answer = Answer(number, 200, decision.answer)
            result = True, answer_line(line, answer, self.where(row.file, row.line))
        return Entry(
            number,
            row.file,
            row.line,
            task.custom_id,
            task.path,
            decision.target,
            decision.score,
            task.body,
            result,
        )

    def _fault(self, number: int, row: InputRow, custom_id: str | None, error: LineError) -> Entry:
        shown = custom_id
        if shown is None and row.fields is not None:
            found = row.fields.get("custom_id")
            shown = found if isinstance(found, str) else None
        content = fault_line(number, shown, error, self.where(row.file, row.line))
        return Entry(number, row.file, row.line, custom_id, result=(False, content))


def _next_block(rows: Iterator[InputRow]) -> list[InputRow]:
    return list(islice(rows, BLOCK_ROWS))
