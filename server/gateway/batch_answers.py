"""Files and batches in OpenAI's shapes, and what may be asked for them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field

from server.batch.records import BatchRecord, FileRecord, Page, Purpose, Status
from server.gateway.answers import Answer

FILES_LIMIT = 10_000
"""Files in a list at the most, and where nobody says how many."""
BATCHES_LIMIT = 100
BATCHES_DEFAULT = 20
SHORTEST_LIFE_S = 3600
LONGEST_LIFE_S = 30 * 24 * 3600
"""Of a file that is to expire."""


class FileAnswer(Answer):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    """Seconds since the epoch, like all moments here."""
    filename: str
    purpose: Purpose
    """`batch`: sent to be asked; `batch_output`: what became of it."""
    status: Literal["processed"] = "processed"
    expires_at: int | None
    """When it goes; none: when it is deleted."""

    @classmethod
    def of(cls, record: FileRecord) -> Self:
        """The file as the store has it."""
        return cls(
            id=record.id,
            bytes=record.bytes,
            created_at=record.created_at,
            filename=record.filename,
            purpose=record.purpose,
            expires_at=record.expires_at,
        )


class FileList(Answer):
    """Files of an API key."""

    object: Literal["list"] = "list"
    data: list[FileAnswer]
    has_more: bool
    """Whether there are others after these."""
    first_id: str | None
    last_id: str | None
    """What `after` is to be, to get those."""

    @classmethod
    def of(cls, page: Page[FileRecord]) -> Self:
        """A page of the store's."""
        data = [FileAnswer.of(record) for record in page.records]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, has_more=page.more, first_id=first, last_id=last)


class FileDeleted(Answer):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class UploadForm(Answer):
    """A file to be asked."""

    file: str = Field(json_schema_extra={"format": "binary"})
    """A JSONL file of requests in OpenAI's batch format, or with plain prompts or chats."""
    purpose: Literal["batch"]
    anchor: Literal["created_at"] = Field(default="created_at", alias="expires_after[anchor]")
    seconds: int | None = Field(
        default=None, alias="expires_after[seconds]", ge=SHORTEST_LIFE_S, le=LONGEST_LIFE_S
    )
    """After which the file is gone; none: it stays until it is deleted."""


Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class BatchRequest(Answer):
    """What is to be asked."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input_file_id: str
    """A file of purpose `batch`."""
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/route"]
    """What every line of the file asks."""
    completion_window: Literal["24h"]
    """After which what is not finished is given up."""
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    """Notes of the client's own."""


class BatchErrorAnswer(Answer):
    """Why a batch failed."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(Answer):
    """Why a batch failed."""

    object: Literal["list"] = "list"
    data: list[BatchErrorAnswer]


class RequestCounts(Answer):
    """How far a batch is."""

    total: int
    """Lines read so far."""
    completed: int
    failed: int


class BatchAnswer(Answer):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status
    output_file_id: str | None
    """Answers, one line each; also of a batch that was cancelled, has expired, or has failed with
    some lines answered."""
    error_file_id: str | None
    """Lines that could not be answered, each with the reason; none where there are none."""
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, record: BatchRecord) -> Self:
        """The batch as the store has it."""
        problem = record.problem
        errors = None
        if problem is not None:
            told = BatchErrorAnswer(
                code=problem.code, message=problem.message, line=problem.line, param=problem.param
            )
            errors = BatchErrors(data=[told])
        return cls(
            id=record.id,
            endpoint=record.endpoint,
            errors=errors,
            input_file_id=record.input_file_id,
            status=record.status,
            output_file_id=record.output_file_id,
            error_file_id=record.error_file_id,
            created_at=record.created_at,
            in_progress_at=record.in_progress_at,
            expires_at=record.expires_at,
            finalizing_at=record.finalizing_at,
            completed_at=record.completed_at,
            failed_at=record.failed_at,
            expired_at=record.expired_at,
            cancelling_at=record.cancelling_at,
            cancelled_at=record.cancelled_at,
            request_counts=RequestCounts(
                total=record.total, completed=record.done, failed=record.failed
            ),
            metadata=None if record.metadata is None else dict(record.metadata),
        )


class BatchList(Answer):
    """Batches of an API key."""

    object: Literal["list"] = "list"
    data: list[BatchAnswer]
    has_more: bool
    """Whether there are others after these."""
    first_id: str | None
    last_id: str | None
    """What `after` is to be, to get those."""

    @classmethod
    def of(cls, page: Page[BatchRecord]) -> Self:
        """A page of the store's."""
        data = [BatchAnswer.of(record) for record in page.records]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, has_more=page.more, first_id=first, last_id=last)
