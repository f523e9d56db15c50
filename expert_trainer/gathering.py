"""Sources to a spool of documents without copies, and which of them are trained on.

Knows nothing of clusters or tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.schema import DataConfig
from expert_trainer.corpus import (
    COMPLETION,
    MESSAGES,
    PROMPT,
    CorpusReport,
    full_text,
    is_held_out,
    read_documents,
)
from expert_trainer.duplicates import Booleans, first_copies, near_copies
from expert_trainer.errors import CorpusError
from expert_trainer.spool import Numbers, Spool, SpoolWriter
from expert_trainer.types import Document
from router.types import OnProgress

PROGRESS_EVERY = 256


@dataclass(frozen=True)
class Gathered:
    """The documents of a run on local disk, no two of them alike."""

    spool: Spool
    train: Numbers
    """Numbers of the documents to train on."""
    heldout: Numbers
    """Held out for calibration and the gate."""
    test: Numbers
    """Held out for evaluation; none where the config names none."""
    report: CorpusReport


def gather(data: DataConfig, seed: int, directory: Path, on_progress: OnProgress) -> Gathered:
    """Read a corpus of any size once, drop copies and split it.

    Of documents that are alike the first of test, valid and train (in this order) stands, so that
    nothing near to what is held out is trained on; where `valid` is empty, the split comes after.

    Args:
        data: the sources, and from what similarity documents are alike.
        seed: of the split.
        directory: for the spool; whoever made it removes it.
        on_progress: told the stages `reading` and `comparing`.

    Raises:
        CorpusError: unreadable sources, too many bad rows, or no document to train on.
    """
    report = CorpusReport()
    on_progress("reading", 0, 1)
    with SpoolWriter(directory) as writer:
        parts = [
            writer.extend(read_documents(sources, data, report, later))
            for sources, later in (
                (data.test, [*data.valid, *data.train]),
                (data.valid, data.train),
                (data.train, []),
            )
        ]
    report.check(data.max_bad_share)
    on_progress("reading", 1, 1)
    spool = writer.spool
    standing = without_copies(spool, data.near_duplicate, report, on_progress)
    test, heldout, train = (numbers[standing[numbers]] for numbers in parts)
    if not data.valid:
        hashes = np.asarray(spool.hashes)
        out = [is_held_out(hashes[number].tobytes(), data.valid_share, seed) for number in train]
        outside = np.array(out, dtype=np.bool_)
        heldout, train = train[outside], train[~outside]
    if not train.size:
        raise CorpusError(
            f"{', '.join(data.train)}: no document to train on; a row needs the field "
            f"'{data.text_field}', or '{MESSAGES}', or '{PROMPT}' and '{COMPLETION}'"
        )
    return Gathered(spool, train, heldout, test, report)


def without_copies(
    spool: Spool, threshold: float | None, report: CorpusReport, on_progress: OnProgress
) -> Booleans:
    """Which documents stand, the first of those alike; shape (N,).

    Args:
        spool: the documents, the most worth keeping first.
        threshold: similarity from which they are alike; none: exact copies alone are.
        report: counts those that go.
        on_progress: told the stage `comparing`.
    """
    standing = first_copies(spool.hashes)
    report.duplicates = len(standing) - int(standing.sum())
    if threshold is None:
        return standing
    numbers = np.flatnonzero(standing)
    texts = map(full_text, _told(spool.documents(numbers), len(numbers), on_progress))
    with tempfile.TemporaryDirectory(dir=spool.directory) as directory:
        gone = near_copies(texts, len(numbers), threshold, Path(directory))
    standing[numbers[gone]] = False
    report.near_duplicates = int(gone.sum())
    return standing


def _told(documents: Iterable[Document], total: int, on_progress: OnProgress) -> Iterator[Document]:
    for done, document in enumerate(documents):
        if done % PROGRESS_EVERY == 0:
            on_progress("comparing", done, total)
        yield document
    on_progress("comparing", total, total)
