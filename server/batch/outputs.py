"""The files that a job leaves: tried out before any work, each appearing whole.

Knows nothing of what is in them but for Parquet's columns.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from expert_trainer.errors import StorageError
from expert_trainer.storage import Storage, is_url
from server.batch.errors import BatchOutputError

PARQUET = ".parquet"
ENDINGS = (".jsonl", PARQUET)
PARQUET_ROWS = 4096
SHARE_OF_INPUT = 3
"""Bytes that a job writes for each of its input, at least: the ledger, and the output twice."""
SPARE_BYTES = 64 * 1024 * 1024


def check_outputs(places: Sequence[str], work: Path, input_bytes: int) -> None:
    """Find out before the work, not after it, whether its outputs can be written.

    Args:
        places: paths or URLs of files that are to be written.
        work: the job's own directory, made if missing.
        input_bytes: size of the inputs that lie on disk.

    Raises:
        BatchOutputError: one cannot, or the disk has no room.
    """
    if len(set(places)) < len(places):
        raise BatchOutputError(f"{places[0]} is named for answers and for errors; give two files")
    for place in places:
        if not is_url(place) and Path(place).is_dir():
            raise BatchOutputError(f"{place} is a directory; name a file in it")
        parent, _ = _split(place)
        try:
            parent.make()
        except StorageError as error:
            raise BatchOutputError(f"{place} cannot be written: {error}") from None
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BatchOutputError(
            f"{work} cannot be made: {error.strerror}; the job keeps its ledger there, or where "
            "--work says"
        ) from None
    needed = SHARE_OF_INPUT * input_bytes + SPARE_BYTES
    on_disk = {work, *(Path(p).absolute().parent for p in places if not is_url(p))}
    for directory in on_disk:
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise BatchOutputError(
                f"the disk of {directory} has {free / 2**20:,.0f} MiB free, and the job may need "
                f"{needed / 2**20:,.0f} MiB; make room or choose another place"
            )


def check_kind(place: str) -> None:
    """See that an output is of a kind that can be written.

    Raises:
        BatchOutputError: it is not.
    """
    if not place.endswith(ENDINGS):
        raise BatchOutputError(f"{place}: only {', '.join(ENDINGS)} can be written")


def exists(place: str) -> bool:
    """Whether a file is there already.

    Raises:
        BatchOutputError: its server cannot be reached.
    """
    parent, name = _split(place)
    try:
        return parent.exists(name)
    except StorageError as error:
        raise BatchOutputError(str(error)) from None


def write_output(place: str, lines: Iterable[bytes], work: Path) -> None:
    """Write lines, in place of a file that is there; it appears whole.

    Args:
        place: path or URL; one that ends with `.parquet` is Parquet, any other JSONL.
        lines: without newlines.
        work: where what goes to a URL is written first.

    Raises:
        BatchOutputError: it cannot be written.
    """
    parent, name = _split(place)
    directory = parent.path or work
    try:
        with _staged(directory, name) as staged:
            _write_parquet(staged, lines) if name.endswith(PARQUET) else _write_jsonl(staged, lines)
            if parent.path is None:
                parent.put_file(staged, name)
            else:
                staged.replace(parent.path / name)
    except StorageError as error:
        raise BatchOutputError(str(error)) from None
    except OSError as error:
        raise BatchOutputError(
            f"{place} cannot be written: {error.strerror or error}; mend that and give the same "
            "command again: what is finished stands"
        ) from None


@contextmanager
def _staged(directory: Path, name: str) -> Iterator[Path]:
    """A path to write to, gone afterwards unless it has been renamed."""
    handle, path = tempfile.mkstemp(prefix=f".{name}.", suffix=".part", dir=directory)
    os.close(handle)
    Path(path).chmod(0o666 & ~_umask())
    try:
        yield Path(path)
    finally:
        Path(path).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_jsonl(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for line in lines:
            file.write(line)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write_parquet(path: Path, lines: Iterable[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("custom_id", pa.string()),
            ("file", pa.string()),
            ("line", pa.int64()),
            ("status_code", pa.int32()),
            ("expert", pa.string()),
            ("version", pa.string()),
            ("route_score", pa.float64()),
            ("text", pa.string()),
            ("body", pa.string()),
        ]
    )
    remaining = iter(lines)
    with pq.ParquetWriter(path, schema) as writer:
        while block := list(islice(remaining, PARQUET_ROWS)):
            rows = [_row(msgspec.json.decode(line)) for line in block]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _row(line: dict[str, Any]) -> dict[str, Any]:
    body = line["response"]["body"]
    choices = body.get("choices") or [{}]
    text = choices[0].get("text") or (choices[0].get("message") or {}).get("content")
    return {
        "custom_id": line["custom_id"],
        "status_code": line["response"]["status_code"],
        "text": text,
        "body": msgspec.json.encode(body).decode(),
        **line["introvert"],
    }


def _split(place: str) -> tuple[Storage, str]:
    directory, _, name = place.rpartition("/")
    if is_url(place):
        return Storage(directory), name
    return Storage(Path(place).absolute().parent), Path(place).name
