"""Where commands put their words: results on stdout, progress on stderr, reports in files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from configs.errors import IntrovertError


class ReportError(IntrovertError):
    """The file named by --report cannot be written."""


_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)


@contextmanager
def results_alone() -> Iterator[None]:
    """Keep stdout for `say`: what libraries print goes to stderr inside the context.

    Ray, for one, prints there that a node has died, in the middle of our JSON lines.
    """
    token = _RESULTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(token)


def results() -> TextIO:
    """Where results go."""
    return _RESULTS.get() or sys.stdout


def say(text: str) -> None:
    """One line of results on stdout, at once."""
    print(text, file=results(), flush=True)


def note(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def check_report(path: str | None) -> None:
    """Find out before the work, not after it, whether a report can be written.

    Raises:
        ReportError: the directory is missing or not writable.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ReportError(f"--report {path} is a directory; name a file")
    folder = Path(path).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ReportError(f"--report {path}: {folder} is not a writable directory; make it first")


def write_report(path: str | None, content: dict[str, Any]) -> None:
    """Write a report atomically; nothing to do without a path."""
    if path is None:
        return
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(target)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain text table: numbers to the right, words to the left, as wide as its content."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(headers))
    ]
    widths = [
        max(len(header), *(len(row[i]) for row in cells)) if cells else len(header)
        for i, header in enumerate(headers)
    ]

    def line(values: Sequence[str]) -> str:
        padded = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(list(headers)), rule, *(line(row) for row in cells)])


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
