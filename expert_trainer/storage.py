"""A run's directory, on this machine's disk or behind an fsspec URL.

What appears in it appears whole: a file at once, a tree at once where there is a disk, or else
with its marker file last. So a reader who waits for the marker never meets half of anything.

Knows nothing of what is stored.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from expert_trainer.disk import TEMPORARY, Disk, remove, staged_name, swap_in
from expert_trainer.errors import StorageError
from expert_trainer.remote import Remote, redacted, without_secrets

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
LOCAL_SCHEMES = ("file://", "local://")


class Place(Protocol):
    """What a disk and a server behind a URL have in common; errors are the system's own."""

    def make(self) -> None:
        """Make the directory."""

    def read(self, name: str) -> bytes:
        """A file's content."""

    def download(self, name: str, target: Path) -> None:
        """Copy a file to a local path."""

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, whole or not at all."""

    def upload(self, source: Path, name: str) -> None:
        """Put a copy of a local file there, whole or not at all."""

    def exists(self, name: str) -> bool:
        """Whether a file or directory is there."""

    def names(self, name: str) -> list[str]:
        """What lies directly in a directory."""

    def files(self, name: str) -> dict[str, int]:
        """Bytes of all files below a directory, by their path in it."""

    def remove(self, name: str) -> None:
        """Take away a file, or a directory with all in it."""

    def put_tree(self, source: Path, name: str, marker: str) -> None:
        """Put a copy of a local directory there."""

    def put_files(self, files: Mapping[str, bytes], name: str, marker: str) -> None:
        """Put a directory there that holds these files."""


class Storage:
    """One directory, named by a path or an fsspec URL; cheap to make and to send to a process.

    Shown as text it hides the URL's password; `url` has it. Any thread may use it.
    """

    def __init__(self, url: str | Path) -> None:
        """Name the directory; nothing is looked at yet.

        Raises:
            StorageError: a URL that cannot be one.
        """
        self.url = _canonical(str(url))
        try:
            self._place: Place = Remote(self.url) if is_url(self.url) else Disk(Path(self.url))
        except ValueError as error:
            raise StorageError(f"{self} is no URL ({error}); mend it") from None

    def __repr__(self) -> str:
        return f"Storage({str(self)!r})"

    def __str__(self) -> str:
        return redacted(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> Storage:
        """The directory of that name inside this one."""
        return Storage(f"{self.url}{'' if self.url.endswith('/') else '/'}{name}")

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.url,)

    @property
    def path(self) -> Path | None:
        """Where it lies on this machine's disk; none behind a URL."""
        return None if is_url(self.url) else Path(self.url)

    def absolute(self) -> Storage:
        """The same directory for processes that run elsewhere on this machine."""
        return self if self.path is None else Storage(self.path.absolute())

    def make(self) -> None:
        """Make the directory and try writing to it.

        Raises:
            StorageError: it cannot be made or written to.
        """
        probe = staged_name()
        with self._writing():
            self._place.make()
            self._place.write(probe, b"probe")
            self._place.remove(probe)

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: it is not there.
            StorageError: it cannot be read.
        """
        with self._reading():
            return self._place.read(name)

    def get_file(self, name: str, target: Path) -> None:
        """Copy a file from there to a local path, whole or not at all.

        Unlike `read` it never holds all of the file in memory.

        Raises:
            FileNotFoundError: it is not there.
            StorageError: it cannot be read, or not be written here.
        """
        with self._reading(f"copied to {target}"), _arriving(target) as staged:
            self._place.download(name, staged)

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, whole or not at all; it takes the place of one that is there.

        Raises:
            StorageError: it cannot be written, the disk being full among the reasons.
        """
        with self._writing():
            self._place.write(name, content)

    def put_file(self, source: Path, name: str) -> None:
        """Put a copy of a local file there, whole or not at all; in place of one that is there.

        Unlike `write` it never holds all of the file in memory.

        Raises:
            StorageError: it cannot be written.
        """
        with self._writing():
            self._place.upload(source, name)

    def exists(self, name: str) -> bool:
        """Whether a file or directory of that name is there.

        Raises:
            StorageError: it cannot be told.
        """
        with self._reading():
            return self._place.exists(name)

    def names(self, name: str = "") -> list[str]:
        """Names of what lies directly in it, or in a directory inside, sorted; none if absent.

        What is not whole yet is not among them.

        Raises:
            StorageError: it cannot be read.
        """
        with self._reading():
            return sorted(
                entry for entry in self._place.names(name) if not entry.startswith(TEMPORARY)
            )

    def files(self, name: str = "") -> dict[str, int]:
        """Bytes of all files below it, or below a directory inside, by their path in that.

        What is not whole yet is not among them.

        Raises:
            StorageError: it cannot be read.
        """
        with self._reading():
            found = self._place.files(name)
        return {path: found[path] for path in sorted(found) if f"/{TEMPORARY}" not in f"/{path}"}

    def remove(self, name: str) -> None:
        """Take a file or a directory with all in it away; it need not be there.

        Raises:
            StorageError: it cannot be removed.
        """
        with self._writing():
            self._place.remove(name)

    def put_tree(self, source: Path, name: str, *, marker: str) -> None:
        """Put a copy of a local directory there, in place of one that is there.

        Args:
            source: a local directory; left as it is.
            name: where its copy appears.
            marker: the file in it without which the rest counts for nothing; written last.

        Raises:
            StorageError: it cannot be written; nothing whole has appeared then.
        """
        with self._writing():
            self._place.put_tree(source, name, marker)

    def put_files(self, files: Mapping[str, bytes], name: str, *, marker: str) -> None:
        """Put a directory there that holds these files; else as `put_tree`."""
        with self._writing():
            self._place.put_files(files, name, marker)

    def get_tree(self, name: str, target: Path) -> None:
        """Copy a directory from there to a local one, which appears whole.

        Args:
            name: a directory in it; its empty directories are left out.
            target: the copy; one that is there is replaced.

        Raises:
            FileNotFoundError: there is no file in it.
            StorageError: it cannot be read, or not be written here.
        """
        files = self.files(name)
        if not files:
            raise FileNotFoundError(errno.ENOENT, "nothing is there", f"{self}/{name}")
        with self._reading(f"copied to {target}"), _arriving(target) as staged:
            for file in files:
                copy = staged / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                self._place.download(f"{name}/{file}" if name else file, copy)

    def sweep(self, name: str = "") -> None:
        """Remove what writers that died have left half done, in it or in a directory inside.

        Nobody else may be writing to that directory meanwhile.

        Raises:
            StorageError: it cannot be read or written to.
        """
        with self._writing():
            for entry in self._place.names(name):
                if entry.startswith(TEMPORARY):
                    self._place.remove(f"{name}/{entry}".lstrip("/"))

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Wait until no other process has the lock of that name, and have it meanwhile.

        Behind a URL there are no locks: nobody waits.

        Raises:
            StorageError: the lock's file cannot be written.
        """
        if self.path is None:
            yield
            return
        with self._writing():
            self._place.make()
            file = (self.path / name).open("w")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _reading(self, action: str = "read") -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            self._explain(error, action)
            raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._explain(error, "written to")
            raise

    def _explain(self, error: Exception, action: str) -> None:
        """Turn a system's error into one that names the directory and the remedy.

        Behind a URL anything may be raised, by a driver for reasons of its own; on a disk, what is
        no system's error is a fault of ours.
        """
        if self.path is not None and not isinstance(error, OSError):
            return
        reason, remedy = _reason(error), _remedy(error, local=self.path is not None)
        shown = without_secrets(reason, self.url)
        raise StorageError(f"{self} cannot be {action} ({shown}); {remedy}", reason=shown) from (
            error if without_secrets(str(error), self.url) == str(error) else None
        )


def as_storage(place: Storage | Path | str) -> Storage:
    """A directory that is named in any of the three ways."""
    return place if isinstance(place, Storage) else Storage(place)


def is_url(url: str) -> bool:
    """Whether it names something else than a path on this machine's disk."""
    return "://" in url


@contextmanager
def _arriving(target: Path) -> Iterator[Path]:
    """A local place to write to, which becomes the target if all goes well."""
    staged = target.with_name(staged_name())
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield staged
        swap_in(staged, target)
    finally:
        remove(staged)


def _canonical(url: str) -> str:
    for scheme in LOCAL_SCHEMES:
        url = url.removeprefix(scheme)
    shorter = url.rstrip("/")
    return url if shorter.endswith(":") and is_url(url) else shorter or "/"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in FULL:
        return "no space left"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _remedy(error: Exception, *, local: bool) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL:
        return "make room there, then give the same command again"
    if number in FORBIDDEN:
        return "see to its permissions, or name another directory"
    if local:
        return "name another directory, or see what is in the way"
    if isinstance(error, ImportError | ValueError):
        return "mend the URL or install the fsspec driver of its scheme, or name a directory"
    return "see that the server can be reached and lets this user in"
