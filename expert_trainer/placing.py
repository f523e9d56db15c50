"""Versioned directories put in their places while nobody else changes the bundle.

Knows nothing of what the directories are for, nor of the manifest that will name them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath

from configs.manifest import FileEntry
from expert_trainer.errors import BundleError, DamagedBundleError
from expert_trainer.hashed import HashedDirectory
from expert_trainer.storage import Storage

UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"})
_LOCK_FILE = ".publish.lock"


@contextmanager
def changing(root: Storage) -> Iterator[None]:
    """Hold a local bundle's lock; what a publisher before us left half done is swept away first.

    Behind a URL leftovers lie in versioned directories, which are emptied before they are filled.
    """
    with root.locked(_LOCK_FILE):
        if root.path is not None:
            for name in ("", "router", *(f"experts/{name}" for name in root.names("experts"))):
                root.sweep(name)
        yield


def refuse_unsafe(directory: Storage, names: Iterable[str]) -> None:
    """See that no file holds weights in a format that would be unpickled.

    Raises:
        BundleError: names the first that does.
    """
    for name in names:
        if PurePosixPath(name).suffix in UNSAFE_SUFFIXES:
            raise BundleError(
                f"{directory}/{name}: weights other than safetensors are not published; "
                "remove the file or convert it"
            )


def check_safetensors(path: str, content: bytes) -> None:
    """See that a file's content is safetensors.

    Raises:
        BundleError: it is not.
    """
    from safetensors import SafetensorError, deserialize

    try:
        deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        raise BundleError(f"{path} is not a safetensors file; train the expert again") from None


def put_in_place(
    root: Storage,
    name: str,
    files: Mapping[str, bytes],
    known: Mapping[str, tuple[FileEntry, ...]],
) -> tuple[FileEntry, ...]:
    """Put a versioned directory in its place, whole, unless it is there and intact.

    Args:
        root: the bundle.
        name: the directory's place in it.
        files: its files' content, by their path in it.
        known: the files of each directory that the manifest in place names.

    Returns:
        The files that are there now, as a manifest lists them.

    Raises:
        StorageError: it cannot be written.
    """
    if name in known:
        with suppress(DamagedBundleError):  # replaced below
            HashedDirectory(root / name, known[name]).verify()
            return known[name]
    # which file comes last is of no account: a directory counts once the manifest names it
    root.put_files(files, name, marker=max(files))
    return tuple(file_entries(files))


def file_entries(files: Mapping[str, bytes]) -> list[FileEntry]:
    """Files as a manifest lists them, sorted by path."""
    return [
        FileEntry(path=name, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        for name, content in sorted(files.items())
    ]


def read_files(directory: Storage) -> dict[str, bytes]:
    """The content of all files below a directory, by their path in it."""
    return {name: directory.read(name) for name in directory.files()}
