"""A file that a client sends as `multipart/form-data`, on its way to the disk.

Of the body no more than a part is in memory at any time, and what was written goes again unless
the file came whole.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request
from python_multipart.exceptions import FormParserError, MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from configs.schema import GatewayConfig
from server.gateway.client import ClientGoneError
from server.gateway.errors import (
    BadRequestError,
    FileTooLargeError,
    InvalidParameterError,
    MissingParameterError,
    RequestTimeoutError,
)

FIELD_BYTES = 4096
"""Longest value of a field that is no file."""
MAX_FIELDS = 32
FRAME_BYTES = 256 * 1024
"""What a body may have beside the file: the other fields, and all parts' headers."""
WRITE_BYTES = 1024 * 1024
"""Bytes that are written at once."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that came whole."""

    filename: str
    fields: dict[str, str]
    """The other fields of the form."""


async def receive_file(request: Request, config: GatewayConfig, content: Path) -> Upload:
    """Write the field `file` of a form to a new file, which is gone if this raises.

    Raises:
        BadRequestError: the body is no form.
        MissingParameterError: there is no file in it.
        FileTooLargeError: the file is over `gateway.max_file_bytes`.
        RequestTimeoutError: nothing came for `gateway.client_timeout_s` seconds.
        ClientGoneError: the client hung up.
    """
    form = _Form(_boundary(request), config.max_file_bytes)
    announced = request.headers.get("content-length")
    if announced is not None and int(announced) > config.max_file_bytes + FRAME_BYTES:
        raise _too_large(config.max_file_bytes)
    try:
        file = await asyncio.to_thread(content.open, "xb")
        try:
            more = True
            size = 0
            while more:
                chunk, more = await _next_chunk(request, config.client_timeout_s)
                size += len(chunk)
                if size > config.max_file_bytes + FRAME_BYTES:
                    raise _too_large(config.max_file_bytes)
                form.feed(chunk)
                if len(form.waiting) >= WRITE_BYTES or not more:
                    block, form.waiting = form.waiting, bytearray()
                    await asyncio.to_thread(file.write, block)
        finally:
            await asyncio.to_thread(file.close)
        return form.end()
    except BaseException:
        discard(content)
        raise


def discard(content: Path) -> None:
    """Remove a file that nobody has taken over."""
    content.unlink(missing_ok=True)


async def _next_chunk(request: Request, timeout_s: float) -> tuple[bytes, bool]:
    """The next part of the body, and whether there is more."""
    try:
        async with asyncio.timeout(timeout_s):
            message = await request.receive()
    except TimeoutError:
        raise RequestTimeoutError(
            f"Nothing more of the file came for {timeout_s:g} s. Send it faster, or have "
            "'gateway.client_timeout_s' raised."
        ) from None
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message.get("body", b""), message.get("more_body", False)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequestError(
            "Send the file as 'multipart/form-data' with the fields 'file' and 'purpose'."
        )
    return boundary


@dataclass(slots=True)
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


class _Form:
    """A form as it comes."""

    def __init__(self, boundary: bytes, limit: int) -> None:
        self.waiting = bytearray()
        """Bytes of the file that are not written yet."""
        self._limit = limit
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._size = 0
        self._part = _Part()
        self._parts = 0
        self._header = (bytearray(), bytearray())
        self._whole = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_begin": self._begin_header,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _unreadable(error) from None

    def feed(self, chunk: bytes) -> None:
        """Read on."""
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise _unreadable(error) from None

    def end(self) -> Upload:
        """What came."""
        if not self._whole:
            raise BadRequestError("The form ends before its last boundary. Send it again.")
        if self._filename is None:
            raise MissingParameterError(
                "The form has no file: send one as the field 'file', with a file name.",
                param="file",
            )
        return Upload(self._filename, self._fields)

    def _begin_part(self) -> None:
        self._part = _Part()
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise BadRequestError(f"The form has more than {MAX_FIELDS} fields. Send fewer.")

    def _begin_header(self) -> None:
        self._header = (bytearray(), bytearray())

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _end_header(self) -> None:
        name, value = self._header
        self._part.headers[bytes(name).lower()] = bytes(value)

    def _end_headers(self) -> None:
        part = self._part
        _, options = parse_options_header(part.headers.get(b"content-disposition", b""))
        part.name = options.get(b"name", b"").decode("utf-8", "replace")
        if part.name != "file":
            return
        if b"filename" not in options:
            raise InvalidParameterError("'file' must be a file, with a file name.", param="file")
        if self._filename is not None:
            raise InvalidParameterError("Send one file at a time.", param="file")
        part.filename = options[b"filename"].decode("utf-8", "replace")
        self._filename = part.filename

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.filename is not None:
            self._size += end - start
            if self._size > self._limit:
                raise _too_large(self._limit)
            self.waiting += memoryview(data)[start:end]
            return
        if len(part.value) + end - start > FIELD_BYTES:
            raise InvalidParameterError(
                f"'{part.name[:200]}' is longer than {FIELD_BYTES} bytes.", param=part.name[:200]
            )
        part.value += data[start:end]

    def _end_part(self) -> None:
        if self._part.filename is None:
            self._fields[self._part.name] = self._part.value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._whole = True


def _unreadable(error: FormParserError) -> BadRequestError:
    return BadRequestError(f"The form cannot be read: {error}. Send 'multipart/form-data'.")


def _too_large(limit: int) -> FileTooLargeError:
    return FileTooLargeError(
        f"The file is larger than the limit of {limit} bytes. Split it, or have "
        "'gateway.max_file_bytes' raised.",
        param="file",
    )
