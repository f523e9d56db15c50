"""Files and batches as they are told: plain data. Knows nothing of where they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Purpose = Literal["batch", "batch_output"]
Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "cancelling",
    "cancelled",
    "expired",
]
OPEN: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
"""Those of which more is to come."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that somebody has sent, or that a batch has made."""

    id: str
    tenant: str
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int
    """Seconds since the epoch, like all moments here."""
    expires_at: int | None = None
    """When it goes; none: when it is removed."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a batch failed."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch and where it stands."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    status: Status
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    expired_at: int | None
    output_file_id: str | None
    error_file_id: str | None
    problem: Problem | None
    total: int
    """Lines read so far."""
    done: int
    """Answered."""
    failed: int
    """Error lines."""
    metadata: Mapping[str, str] | None


Record = TypeVar("Record", FileRecord, BatchRecord)


@dataclass(frozen=True, slots=True)
class Page(Generic[Record]):
    """A part of a list."""

    records: Sequence[Record]
    more: bool
    """Whether there are others after these."""
