"""A published directory and what its files must be: verified where it lies, or copied and verified.

Knows nothing of manifests, of routers or of experts.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from configs.manifest import FileEntry
from expert_trainer.disk import TEMPORARY, staged_name, swap_in
from expert_trainer.errors import DamagedBundleError
from expert_trainer.storage import Storage

_LOCK_FILE = ".copy.lock"


@dataclass(frozen=True)
class HashedDirectory:
    """A directory of a bundle with the files that its manifest lists for it."""

    place: Storage
    files: tuple[FileEntry, ...]

    def verify(self) -> None:
        """Read every file and compare.

        Raises:
            DamagedBundleError: the first file that is missing, unknown, truncated or changed.
        """
        self._verify(self.place)

    def read(self, name: str) -> bytes:
        """The content of one of its files, verified.

        Raises:
            DamagedBundleError: it is missing, not listed, or not what it was.
        """
        for entry in self.files:
            if entry.path == name:
                try:
                    content = self.place.read(name)
                except FileNotFoundError:
                    raise self._damaged(name, "is missing") from None
                self._compare(entry, content)
                return content
        raise self._damaged(name, "is not listed in the manifest")

    def fetch(self, target: Path) -> Path:
        """The directory on this machine: itself where it is local, or else a verified copy.

        A copy that is there and intact stands, and nothing is asked of the server. Processes that
        want the same copy wait for each other.

        Args:
            target: where the copy appears, whole.

        Raises:
            DamagedBundleError: what lies behind the URL is not what was published.
            StorageError: the server cannot be reached, or the copy not be written.
        """
        if self.place.path is not None:
            return self.place.path
        with _only_one(target.parent):
            if not self._stands(target):
                with tempfile.TemporaryDirectory(prefix=staged_name(), dir=target.parent) as folder:
                    staged = Path(folder) / "copy"
                    self._copy(staged)
                    self._verify(Storage(staged))
                    swap_in(staged, target)
        return target

    def _stands(self, copy: Path) -> bool:
        with suppress(DamagedBundleError):
            self._verify(Storage(copy))
            return True
        return False

    def _copy(self, target: Path) -> None:
        for entry in self.files:
            try:
                self.place.get_file(entry.path, target / entry.path)
            except FileNotFoundError:
                raise self._damaged(entry.path, "is missing") from None

    def _verify(self, copy: Storage) -> None:
        """Compare a copy, or the directory itself; what is wrong is told of the directory."""
        sizes = copy.files()
        for name in sorted(sizes.keys() - {entry.path for entry in self.files}):
            raise self._damaged(name, "is not listed in the manifest")
        for entry in self.files:
            if entry.path not in sizes:
                raise self._damaged(entry.path, "is missing")
            self._compare_size(entry, sizes[entry.path])
            self._compare(entry, copy.read(entry.path))

    def _compare(self, entry: FileEntry, content: bytes) -> None:
        self._compare_size(entry, len(content))
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise self._damaged(entry.path, "was changed after it had been published")

    def _compare_size(self, entry: FileEntry, size: int) -> None:
        if size != entry.bytes:
            fault = f"has {size:,} bytes where {entry.bytes:,} were published"
            raise self._damaged(entry.path, fault)

    def _damaged(self, name: str, fault: str) -> DamagedBundleError:
        return damaged(f"{self.place}/{name}", fault)


def damaged(path: str, fault: str) -> DamagedBundleError:
    """The error for a file of a bundle that is not what was published."""
    return DamagedBundleError(
        f"{path} {fault}; publish the bundle again with `introvert train`, "
        "which trains nothing that is already finished"
    )


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Let one process after the other copy into a local directory."""
    with Storage(directory).locked(_LOCK_FILE):
        for leftover in directory.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
