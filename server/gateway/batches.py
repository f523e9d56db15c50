"""`/v1/files` and `/v1/batches`: what is asked at leisure, in OpenAI's terms.

This module writes down what is asked for and tells what became of it; who does it is
`server.batch.runner`. Each API key sees its own files and batches, and no others. The store's calls
block, so they are made in threads.
"""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import ValidationError

from server.gateway.batch_answers import (
    BATCHES_DEFAULT,
    BATCHES_LIMIT,
    FILES_LIMIT,
    LONGEST_LIFE_S,
    SHORTEST_LIFE_S,
    BatchAnswer,
    BatchList,
    BatchRequest,
    FileAnswer,
    FileDeleted,
    FileList,
    UploadForm,
)
from server.gateway.documented import Responses, errors
from server.gateway.errors import (
    BatchNotKnownError,
    BatchOverError,
    FileInUseError,
    FileNotKnownError,
    InvalidParameterError,
    MissingParameterError,
    NoRoomError,
)
from server.gateway.limits import body_of_request, limited_head
from server.gateway.parts import Parts
from server.gateway.protocol import parse_object
from server.gateway.tenants import Tenant
from server.gateway.uploads import discard, receive_file

MAX_BATCH_BYTES = 64 * 1024
"""Of a request for a batch, whose lines lie in a file."""
MAX_NAME = 255
FILE_CONTENT: Responses = {
    200: {
        "description": "The file as it is.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def batch_routes(parts: Parts) -> APIRouter:
    """Files, and the batches that are made of them."""
    routes = APIRouter(tags=["batches"], dependencies=[limited_head(parts.config)])
    add_file_routes(routes, parts)
    add_batch_routes(routes, parts)
    return routes


def add_file_routes(routes: APIRouter, parts: Parts) -> None:
    """`/v1/files`."""
    store = parts.store

    @routes.post(
        "/v1/files",
        responses=errors(401, 413, 507),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"multipart/form-data": {"schema": UploadForm.model_json_schema()}},
            }
        },
    )
    async def create_file(request: Request) -> FileAnswer:
        """Take a file for batches."""
        tenant = _tenant(parts, request)
        with _room():
            return await _take_file(parts, tenant, request)

    @routes.get(
        "/v1/files",
        responses=errors("4XX", 401, 404),
        openapi_extra=_listed(
            FILES_LIMIT,
            FILES_LIMIT,
            _parameter("purpose", {"type": "string"}, "Files of this purpose alone."),
            _parameter(
                "order",
                {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
                "`desc`: the newest first.",
            ),
        ),
    )
    async def list_files(request: Request) -> FileList:
        """The files of this API key."""
        tenant = _tenant(parts, request)
        asked = request.query_params
        after = asked.get("after")
        page = await asyncio.to_thread(
            store.files,
            tenant.name,
            limit=_limit(request, FILES_LIMIT, FILES_LIMIT),
            after=after,
            purpose=asked.get("purpose"),
            oldest_first=_oldest_first(request),
        )
        if page is None:
            raise _no_file(after or "", "after")
        return FileList.of(page)

    # Any text is a valid path here, so the 422 that FastAPI would announce cannot happen.
    @routes.get("/v1/files/{file_id}", responses=errors("4XX", 401, 404))
    async def retrieve_file(file_id: str, request: Request) -> FileAnswer:
        """What is known of a file."""
        tenant = _tenant(parts, request)
        record = await asyncio.to_thread(store.file, tenant.name, file_id)
        if record is None:
            raise _no_file(file_id)
        return FileAnswer.of(record)

    @routes.get(
        "/v1/files/{file_id}/content",
        response_class=Response,
        responses={**FILE_CONTENT, **errors("4XX", 401, 404)},
    )
    async def file_content(file_id: str, request: Request) -> Response:
        """A file's content."""
        tenant = _tenant(parts, request)
        record = await asyncio.to_thread(store.file, tenant.name, file_id)
        if record is None:
            raise _no_file(file_id)
        content = store.content_of(record.id)
        try:
            stat = await asyncio.to_thread(content.stat)
        except FileNotFoundError:  # removed at this moment
            raise _no_file(file_id) from None
        return FileResponse(content, media_type="application/octet-stream", stat_result=stat)

    @routes.delete("/v1/files/{file_id}", responses=errors("4XX", 401, 404, 409))
    async def delete_file(file_id: str, request: Request) -> FileDeleted:
        """Remove a file."""
        tenant = _tenant(parts, request)
        removal = await asyncio.to_thread(store.remove_file, tenant.name, file_id)
        if removal == "in use":
            raise FileInUseError(
                f"'{file_id[:200]}' is read by a batch. Cancel that, or wait until it is over."
            )
        if removal == "unknown":
            raise _no_file(file_id)
        return FileDeleted(id=file_id)


def add_batch_routes(routes: APIRouter, parts: Parts) -> None:
    """`/v1/batches`."""
    store = parts.store

    @routes.post(
        "/v1/batches",
        responses=errors(401, 404, 413, 507),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": BatchRequest.model_json_schema()}},
            }
        },
    )
    async def create_batch(request: Request) -> BatchAnswer:
        """Have every line of a file asked, behind all that is asked now."""
        tenant = _tenant(parts, request)
        asked = _batch_request(await body_of_request(request, parts.config, MAX_BATCH_BYTES))
        with _room():
            record = await asyncio.to_thread(
                store.add_batch,
                tenant.name,
                endpoint=asked.endpoint,
                input_file_id=asked.input_file_id,
                metadata=asked.metadata,
            )
        if record is None:
            raise _no_file(asked.input_file_id, "input_file_id")
        return BatchAnswer.of(record)

    @routes.get(
        "/v1/batches",
        responses=errors("4XX", 401, 404),
        openapi_extra=_listed(BATCHES_LIMIT, BATCHES_DEFAULT),
    )
    async def list_batches(request: Request) -> BatchList:
        """The batches of this API key, the newest first."""
        tenant = _tenant(parts, request)
        after = request.query_params.get("after")
        page = await asyncio.to_thread(
            store.batches,
            tenant.name,
            limit=_limit(request, BATCHES_LIMIT, BATCHES_DEFAULT),
            after=after,
        )
        if page is None:
            raise _no_batch(after or "", "after")
        return BatchList.of(page)

    @routes.get("/v1/batches/{batch_id}", responses=errors("4XX", 401, 404))
    async def retrieve_batch(batch_id: str, request: Request) -> BatchAnswer:
        """Where a batch stands."""
        tenant = _tenant(parts, request)
        record = await asyncio.to_thread(store.batch, tenant.name, batch_id)
        if record is None:
            raise _no_batch(batch_id)
        return BatchAnswer.of(record)

    @routes.post("/v1/batches/{batch_id}/cancel", responses=errors("4XX", 401, 404, 409))
    async def cancel_batch(batch_id: str, request: Request) -> BatchAnswer:
        """End a batch before its time; what is finished is kept."""
        tenant = _tenant(parts, request)
        record = await asyncio.to_thread(store.cancel, tenant.name, batch_id)
        if record is None:
            raise _no_batch(batch_id)
        if record.status not in ("cancelling", "cancelled"):
            raise BatchOverError(f"The batch is '{record.status}' and cannot be cancelled.")
        return BatchAnswer.of(record)


@contextmanager
def _room() -> Iterator[None]:
    """Tell a client what a full disk is.

    Raises:
        NoRoomError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
    else:
        return
    raise NoRoomError(
        "The disk for files and batches is full. Delete files that are no longer needed (DELETE "
        "/v1/files/{file_id}), or have room made on the disk of 'bundle.scratch_dir'."
    )


def _tenant(parts: Parts, request: Request) -> Tenant:
    return parts.keyring.identify(request.scope["headers"])


async def _take_file(parts: Parts, tenant: Tenant, request: Request) -> FileAnswer:
    content = await asyncio.to_thread(parts.store.new_content)
    upload = await receive_file(request, parts.config, content)
    try:
        purpose = upload.fields.get("purpose")
        if purpose is None:
            raise MissingParameterError("The field 'purpose' is missing.", param="purpose")
        if purpose != "batch":
            raise InvalidParameterError(
                "'purpose' must be 'batch'; files serve nothing else here.", param="purpose"
            )
        name, lives_s = upload.filename[:MAX_NAME], _life(upload.fields)
        return FileAnswer.of(
            await asyncio.to_thread(parts.store.add_file, tenant.name, name, content, lives_s)
        )
    finally:
        discard(content)


def _life(fields: Mapping[str, str]) -> int | None:
    """Seconds after which a file is to expire, if it is."""
    if (anchor := fields.get("expires_after[anchor]", "created_at")) != "created_at":
        raise InvalidParameterError(
            f"'expires_after[anchor]' is {anchor[:100]!r}; it must be 'created_at'.",
            param="expires_after[anchor]",
        )
    said = fields.get("expires_after[seconds]")
    if said is None:
        return None
    seconds = int(said) if said.isascii() and said.isdecimal() and len(said) < 10 else 0
    if not SHORTEST_LIFE_S <= seconds <= LONGEST_LIFE_S:
        raise InvalidParameterError(
            f"'expires_after[seconds]' must be from {SHORTEST_LIFE_S} to {LONGEST_LIFE_S}.",
            param="expires_after[seconds]",
        )
    return seconds


def _batch_request(body: bytes) -> BatchRequest:
    fields = parse_object(body)
    for name in ("input_file_id", "endpoint", "completion_window"):
        if name not in fields:
            raise MissingParameterError(f"The field '{name}' is missing.", param=name)
    try:
        return BatchRequest.model_validate(fields)
    except ValidationError as error:
        fault = error.errors()[0]
        field = str(fault["loc"][0])
        raise InvalidParameterError(
            f"'{field}' cannot be used: {fault['msg']}.", param=field
        ) from None


def _limit(request: Request, most: int, default: int) -> int:
    said = request.query_params.get("limit")
    if said is None:
        return default
    limit = int(said) if said.isascii() and said.isdecimal() and len(said) < 10 else 0
    if not 1 <= limit <= most:
        raise InvalidParameterError(f"'limit' must be from 1 to {most}.", param="limit")
    return limit


def _oldest_first(request: Request) -> bool:
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidParameterError("'order' must be 'asc' or 'desc'.", param="order")
    return order == "asc"


def _listed(most: int, default: int, *more: dict[str, Any]) -> dict[str, Any]:
    """The query of a list as OpenAPI has it."""
    limit = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    parameters: Sequence[dict[str, Any]] = [
        _parameter("limit", limit, "How many at the most."),
        _parameter("after", {"type": "string"}, "Id of the one before the first."),
        *more,
    ]
    return {"parameters": list(parameters)}


def _parameter(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _no_file(file_id: str, param: str | None = None) -> FileNotKnownError:
    return FileNotKnownError(
        f"This API key has no file '{file_id[:200]}' for this. GET /v1/files lists what it has.",
        param=param,
    )


def _no_batch(batch_id: str, param: str | None = None) -> BatchNotKnownError:
    return BatchNotKnownError(
        f"This API key has no batch '{batch_id[:200]}'. GET /v1/batches lists what it has.",
        param=param,
    )
