"""The rows of a job's inputs, one after another, each with its place; read in little memory.

Knows nothing of what a row means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from expert_trainer.errors import CorpusError
from expert_trainer.sources import ENDINGS, PARQUET, files_of, open_source, read_rows
from expert_trainer.storage import is_url
from server.batch.errors import BatchInputError

MAX_LINE_BYTES = 8 * 1024 * 1024
"""Of one line of JSONL; a longer one is an error line, and is not held in memory."""

_OBJECT = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row, or what kept it from being one."""

    file: int
    """Number of its file, from 0."""
    line: int
    """Number of its line or row there, from 1."""
    fields: dict[str, Any] | None
    code: str = ""
    fault: str = ""


def input_files(inputs: Sequence[str]) -> list[str]:
    """Files of a job in the order in which they are read.

    Raises:
        BatchInputError: one is not there, or of no known kind.
    """
    found: list[str] = []
    for source in inputs:
        if source.startswith("hub:"):
            raise BatchInputError(f"{source}: a batch reads files, not hub data sets")
        try:
            if not is_url(source) and Path(source).is_dir():
                inside = [p for p in sorted(Path(source).iterdir()) if p.name.endswith(ENDINGS)]
                if not inside:
                    raise BatchInputError(f"{source}: no {', '.join(ENDINGS)} file lies in it")
                found += map(str, inside)
            else:
                found += files_of(source)
        except CorpusError as error:
            raise BatchInputError(str(error)) from None
    return found


def read_input(files: Sequence[str], after: tuple[int, int] = (0, 0)) -> Iterator[InputRow]:
    """Rows of the files, those up to `after` (file, line) left out; blank lines are no rows.

    Raises:
        BatchInputError: a file cannot be read.
    """
    for number in range(after[0], len(files)):
        skip = after[1] if number == after[0] else 0
        try:
            if files[number].endswith(PARQUET):
                yield from _parquet(files[number], number, skip)
            else:
                yield from _jsonl(files[number], number, skip)
        except CorpusError as error:
            raise BatchInputError(str(error)) from None
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise BatchInputError(
                f"{files[number]} cannot be read: {reason}; mend it and give the same command again"
            ) from None


def _parquet(source: str, file: int, skip: int) -> Iterator[InputRow]:
    for line, row in enumerate(read_rows(source, None), 1):
        if line > skip:
            yield InputRow(file, line, row.fields, "invalid_json" if row.fault else "", row.fault)


def _jsonl(source: str, file: int, skip: int) -> Iterator[InputRow]:
    with open_source(source) as lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            whole = line.endswith(b"\n") or len(line) <= MAX_LINE_BYTES
            while not line.endswith(b"\n") and (rest := lines.readline(MAX_LINE_BYTES)):
                whole, line = False, rest
            if number <= skip:
                continue
            if not whole:
                fault = f"the line is longer than {MAX_LINE_BYTES} bytes"
                yield InputRow(file, number, None, "line_too_long", fault)
            elif line.strip():
                yield _parsed(line, file, number)


def _parsed(line: bytes, file: int, number: int) -> InputRow:
    try:
        return InputRow(file, number, _OBJECT.decode(line))
    except msgspec.ValidationError:
        return InputRow(file, number, None, "invalid_json", "the line is not a JSON object")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return InputRow(file, number, None, "invalid_json", f"the line is not JSON ({error})")
