"""An adapter's files on the worker's machine: there, what was published, and nothing unpickled.

Knows nothing of engines; reading is done off the event loop.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from expert_trainer.errors import DamagedBundleError
from expert_trainer.hashed import HashedDirectory
from expert_trainer.storage import Storage
from server.engine import Adapter

SAFE_SUFFIXES = frozenset({".safetensors", ".json"})
"""An engine unpickles weights under other names, and a pickle runs what it likes."""
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""
_LORA_TENSOR = re.compile(r"([^.]+)\.lora_[AB]\.")


async def fetch(adapter: Adapter) -> None:
    """Have its files on this machine; a copy that is there and intact stands.

    Raises:
        DamagedBundleError: what lies behind the URL is not what was published.
        StorageError: the bundle cannot be reached, or the copy not be written.
    """
    if adapter.source is not None and adapter.source.place.path is None:
        await asyncio.to_thread(adapter.source.fetch, Path(adapter.path))


async def modules_of(adapters: Iterable[Adapter]) -> set[str]:
    """Names of the layers that these change, such as `q_proj`; damaged ones are passed over."""
    return set[str]().union(*await asyncio.gather(*map(changed_modules, adapters)))


async def changed_modules(adapter: Adapter) -> set[str]:
    """Names of the layers that it changes; none if its files are damaged."""
    return await asyncio.to_thread(_changed_modules, Path(adapter.path))


async def fault_of(adapter: Adapter) -> str | None:
    """Why its files must not reach an engine; none if they may.

    Raises:
        StorageError: they cannot be read.
    """
    return await asyncio.to_thread(_fault, adapter)


def _changed_modules(directory: Path) -> set[str]:
    """Read from the safetensors' headers, which come first and list all tensors."""
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with suppress(OSError, ValueError, struct.error), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length <= LONGEST_HEADER:
                names.update(json.loads(file.read(length)))
    return {match[1] for match in map(_LORA_TENSOR.search, names) if match}


def _fault(adapter: Adapter) -> str | None:
    directory = Path(adapter.path)
    if not directory.is_dir():
        return f"its directory {directory} is gone; publish it again with `introvert train`"
    for path in sorted(directory.rglob("*")):
        if path.suffix not in SAFE_SUFFIXES and not path.is_dir():
            return f"{path} is neither safetensors nor JSON; take it away, nothing is unpickled"
    if adapter.source is None:
        return None
    try:
        HashedDirectory(Storage(directory), adapter.source.files).verify()
    except DamagedBundleError as error:
        return str(error)
    return None
