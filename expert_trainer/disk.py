"""A directory on this machine's disk, in which files and trees appear by rename.

Knows nothing of URLs or of what is stored; its errors are the system's own.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".staged-"
"""Begins the names of what is not whole yet, here and behind URLs."""
OCCUPIED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR})
"""Why a rename fails where something of another kind, or a full directory, has the name."""


def staged_name() -> str:
    """A name that nobody else uses, for what is not whole yet."""
    return f"{TEMPORARY}{uuid.uuid4().hex}"


class Disk:
    """A local directory; names are relative paths with `/`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self) -> None:
        """Make the directory, parents included."""
        self.root.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> bytes:
        """A file's content."""
        try:
            return (self.root / name).read_bytes()
        except NotADirectoryError as error:  # a file lies where its directory would
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from None

    def download(self, name: str, target: Path) -> None:
        """Copy a file to another local place, without holding all of it in memory."""
        shutil.copyfile(self.root / name, target)

    def write(self, name: str, content: bytes) -> None:
        """Put a file there."""
        with _Arriving(self.root / name) as staged, staged.open("xb") as file:
            file.write(content)

    def upload(self, source: Path, name: str) -> None:
        """Put a copy of a local file there."""
        with _Arriving(self.root / name) as staged:
            shutil.copyfile(source, staged)

    def exists(self, name: str) -> bool:
        """Whether a file or directory is there."""
        return (self.root / name).exists()

    def names(self, name: str) -> list[str]:
        """What lies directly in a directory; nothing if it is absent."""
        directory = self.root / name
        return [entry.name for entry in directory.iterdir()] if directory.is_dir() else []

    def files(self, name: str) -> dict[str, int]:
        """Bytes of all files below a directory, by their path in it."""
        directory = self.root / name
        return {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in directory.rglob("*")
            if path.is_file()
        }

    def remove(self, name: str) -> None:
        """Take away a file, or a directory with all in it."""
        remove(self.root / name)

    def put_tree(self, source: Path, name: str, marker: str) -> None:
        """Put a copy of a directory there, whole at once: the marker's order is of no account."""
        with _Arriving(self.root / name) as staged:
            copy_tree(source, staged)

    def put_files(self, files: Mapping[str, bytes], name: str, marker: str) -> None:
        """Put a directory there that holds these files, whole at once."""
        with _Arriving(self.root / name) as staged:
            for file, content in files.items():
                path = staged / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


class _Arriving:
    """A place beside the target to write to; it becomes the target at the end, if all went well."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._staged = target.with_name(staged_name())

    def __enter__(self) -> Path:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        return self._staged

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                swap_in(self._staged, self._target)
        finally:
            remove(self._staged)


def swap_in(staged: Path, target: Path) -> None:
    """Rename a file or a directory into its place and see that both survive a power cut."""
    for path in (staged, *staged.rglob("*")):
        sync(path)
    displaced = []
    while not _renamed(staged, target):
        displaced.append(target.with_name(staged_name()))
        with suppress(FileNotFoundError):  # another writer has just done the same
            target.rename(displaced[-1])
    for path in displaced:
        remove(path)
    sync(target.parent)


def _renamed(staged: Path, target: Path) -> bool:
    """Rename onto a free name or a file; no rename replaces a directory with files in it."""
    try:
        staged.replace(target)
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
        return False
    return True


def copy_tree(source: Path, target: Path) -> None:
    """Copy a directory's files; the first error of the system is raised as it is."""
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir()
        else:
            shutil.copyfile(path, copy)


def sync(path: Path) -> None:
    """See that a file's content, or the renames in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Take away a file or a directory with all in it; it need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return  # a file lies where its directory would
