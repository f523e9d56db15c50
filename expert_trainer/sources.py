"""Rows of data files: JSONL (also compressed), Parquet and hub data sets, here or behind URLs.

Yields raw rows with the place each came from, one after another, so that a file of any size is
read in little memory. Knows nothing of what a row means; columns that nobody asked for are not
even read.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from expert_trainer.errors import CorpusError
from expert_trainer.storage import is_url

HUB_PREFIX = "hub:"
PARQUET = ".parquet"
JSONL = ".jsonl"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Endings of compressed JSONL files, and what the compression is called."""
ENDINGS = (JSONL, *(f"{JSONL}{ending}" for ending in COMPRESSIONS), PARQUET)
PARQUET_BATCH = 1024
SHORTEST_ROW = len(b'{"text":"a"}\n')
"""Bytes of a line that is not a bad row."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, or what kept it from being one."""

    where: str
    """FILE:LINE, for Parquet and hub data sets FILE:ROW, both counted from 1."""
    fields: dict[str, Any] | None
    fault: str = ""
    """Why there are no fields."""


def read_rows(source: str, fields: Sequence[str] | None) -> Iterator[Row]:
    """Rows of one file or hub data set, in a fixed order.

    Args:
        source: what `files_of` names, or `hub:NAME[:SPLIT]`.
        fields: names to keep; all others are dropped unread. None: all are kept.

    Raises:
        CorpusError: nothing is there, or it cannot be read.
    """
    if source.startswith(HUB_PREFIX):
        return _read_hub(source.removeprefix(HUB_PREFIX), fields)
    if source.endswith(PARQUET):
        return _read_parquet(source, fields)
    return _read_jsonl(source, fields)


def files_of(source: str) -> list[str]:
    """Files of one entry of `data.train`, `data.valid` or `data.test`, sorted; a hub data set
    is itself.

    Args:
        source: a path or fsspec URL, or a glob of either, or `hub:NAME[:SPLIT]`.

    Raises:
        CorpusError: no file matches, or one is of no known kind.
    """
    if source.startswith(HUB_PREFIX):
        return [source]
    found = _remote_files(source) if is_url(source) else _local_files(source)
    if not found:
        raise CorpusError(
            f"{source}: no such file; give a file ({', '.join(ENDINGS)}), a glob, "
            "or hub:NAME[:SPLIT]"
        )
    for name in found:
        if not name.endswith(ENDINGS):
            raise CorpusError(f"{name}: only {', '.join(ENDINGS)} are read; convert it first")
    return found


def most_rows(source: str) -> float:
    """A bound on the rows of a file from its size; infinite where its size does not say."""
    if source.startswith(HUB_PREFIX) or is_url(source) or not source.endswith(JSONL):
        return float("inf")
    return Path(source).stat().st_size / SHORTEST_ROW + 1


def content_key(source: str) -> str:
    """What changes when a source does: a file's hash, for a URL what its store tells of it (size,
    entity tag or time of change), for a hub data set its name."""
    if source.startswith(HUB_PREFIX):
        return source
    if is_url(source):
        filesystem, path = _filesystem(source)
        return f"{source} {filesystem.checksum(path)}"
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local_files(source: str) -> list[str]:
    # Path.glob takes no absolute pattern, and a source may be one
    matches = [source] if Path(source).exists() else glob.glob(source, recursive=True)  # noqa: PTH207
    return sorted(match for match in matches if Path(match).is_file())


def _remote_files(source: str) -> list[str]:
    filesystem, path = _filesystem(source)
    try:
        matches = [path] if filesystem.isfile(path) else filesystem.glob(path)
        return sorted(filesystem.unstrip_protocol(match) for match in matches)
    except OSError as error:
        raise CorpusError(f"{source} cannot be read: {error}; check the URL and access") from None


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CorpusError(
            f"{url}: {reason}; install the fsspec driver of that scheme, or name a file"
        ) from None
    return filesystem, path


def open_source(source: str) -> IO[bytes]:
    """A file, decompressed as its ending says; whoever asked closes it.

    Raises:
        CorpusError: no driver knows the URL's scheme.
        OSError: it cannot be opened.
    """
    if is_url(source):
        filesystem, path = _filesystem(source)
        file: IO[bytes] = filesystem.open(path, "rb")
    else:
        file = Path(source).open("rb")  # noqa: SIM115 - whoever asked closes it
    compression = COMPRESSIONS.get(Path(source).suffix)
    if compression is None:
        return file
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(file, compression))


def _read_jsonl(source: str, fields: Sequence[str] | None) -> Iterator[Row]:
    try:
        with open_source(source) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse_line(line, f"{source}:{number}", fields)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise CorpusError(f"{source} cannot be read: {reason}; check the file") from None


def _parse_line(line: bytes, where: str, fields: Sequence[str] | None) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return Row(where, None, "not JSON")
    if not isinstance(row, dict):
        return Row(where, None, "not a JSON object")
    if b"\\ud" in line.lower() and not _is_unicode(row):
        return Row(where, None, "half a surrogate pair, which is not text")
    return Row(where, _kept(row, fields))


def _is_unicode(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(source: str, fields: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_source(source) as raw, pq.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if fields is None or name in fields]
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{source}:{number}", _without_nulls(row))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CorpusError(f"{source} cannot be read as Parquet: {reason}") from None


def _read_hub(name: str, fields: Sequence[str] | None) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    repository, _, split = name.partition(":")
    try:
        rows = load_dataset(repository, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            kept = _without_nulls(_kept(row, fields))
            yield Row(f"{HUB_PREFIX}{name}:{number}", kept)
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CorpusError(
            f"{HUB_PREFIX}{name}: the data set cannot be read ({reason}); "
            "check its name, its split and the network"
        ) from None


def _kept(row: dict[str, Any], fields: Sequence[str] | None) -> dict[str, Any]:
    if fields is None:
        return row
    return {name: row[name] for name in fields if name in row}


def _without_nulls(value: Any) -> Any:
    """Columnar formats fill what a row does not have with nulls; leave those out again."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
