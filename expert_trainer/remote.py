"""A directory behind an fsspec URL, in which files appear whole.

A file server gets a file under another name and renames it; an object store shows a file only
once it is whole, and renaming would be copying there. A tree appears file by file, its marker
last. Connections are kept per process and thread, since most of them carry one command at a time,
and one that has died unnoticed is made again.

Knows nothing of what is stored; its errors are those of fsspec and its drivers.
"""

from __future__ import annotations

import errno
import ftplib
import logging
import os
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from expert_trainer.disk import staged_name

T = TypeVar("T")
IDLE_S = 1.0
"""Silence after which a connection is tried out before it is used."""

log = logging.getLogger(__name__)


@dataclass
class _Connection:
    """One thread's connection to a server."""

    filesystem: Any
    made: set[str] = field(default_factory=set)
    """Directories known to be there, which saves asking before every file."""
    used: float = 0.0
    """When it last answered, on the clock `time.monotonic`."""

    def require_alive(self) -> None:
        """See that an FTP server has not hung up meanwhile: its last word may pass for an answer.

        Raises:
            OSError, EOFError, ftplib.Error: it has.
        """
        ftp = getattr(self.filesystem, "ftp", None)
        if isinstance(ftp, ftplib.FTP) and time.monotonic() - self.used > IDLE_S:
            ftp.voidcmd("NOOP")


class _Connections(threading.local):
    """This thread's connections by process and server; a forked process inherits none."""

    def __init__(self) -> None:
        self.open: dict[tuple[int, str], _Connection] = {}


_CONNECTIONS = _Connections()


class Remote:
    """A directory behind a URL; names are relative paths with `/`."""

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urlsplit(url)
        # a chain of file systems (`a::b://…`) has no server of its own to share
        self._server = url if "::" in url else f"{parts.scheme}://{parts.netloc}"

    def make(self) -> None:
        """Make the directory, parents included; an object store has none and needs none."""

        def make(connection: _Connection) -> None:
            if _renames(connection.filesystem):
                _make_directory(connection, self._path(connection, ""))

        self._run(make)

    def read(self, name: str) -> bytes:
        """A file's content."""

        def read(connection: _Connection) -> bytes:
            path = self._path(connection, name)
            try:
                content: bytes = connection.filesystem.cat_file(path)
            except FileNotFoundError as error:
                _require_absent(connection, path, error.__cause__)
                raise
            return content

        return self._run(read)

    def download(self, name: str, target: Path) -> None:
        """Copy a file to this machine, without holding all of it in memory."""

        def download(connection: _Connection) -> None:
            path = self._path(connection, name)
            try:
                connection.filesystem.get_file(path, str(target))
            except ftplib.error_perm as error:
                _require_absent(connection, path, error)
                raise FileNotFoundError(errno.ENOENT, "it is not there", name) from error

        self._run(download)

    def write(self, name: str, content: bytes) -> None:
        """Put a file there."""
        self._store(name, lambda filesystem, path: filesystem.pipe_file(path, content))

    def upload(self, source: Path, name: str) -> None:
        """Put a copy of a local file there."""
        self._store(name, lambda filesystem, path: filesystem.put_file(str(source), path))

    def exists(self, name: str) -> bool:
        """Whether a file or directory is there."""
        return self._run(
            lambda connection: _info(connection, self._path(connection, name)) is not None
        )

    def names(self, name: str) -> list[str]:
        """What lies directly in a directory; nothing if it is absent."""

        def names(connection: _Connection) -> list[str]:
            connection.filesystem.invalidate_cache()
            entries = _entries(connection, self._path(connection, name))
            return [posixpath.basename(entry["name"].rstrip("/")) for entry in entries]

        return self._run(names)

    def files(self, name: str) -> dict[str, int]:
        """Bytes of all files below a directory, by their path in it."""

        def files(connection: _Connection) -> dict[str, int]:
            connection.filesystem.invalidate_cache()
            top = self._path(connection, name)
            return {
                entry["name"].strip("/").removeprefix(top.strip("/")).lstrip("/"): entry["size"]
                for entry in _walk(connection, top)
            }

        return self._run(files)

    def remove(self, name: str) -> None:
        """Take away a file, or a directory with all in it."""

        def remove(connection: _Connection) -> None:
            path = self._path(connection, name)
            info = _info(connection, path)
            if info is None:
                return
            connection.made.clear()
            if info["type"] == "directory":
                connection.filesystem.rm(path, recursive=True)
            else:
                connection.filesystem.rm_file(path)

        self._run(remove)

    def put_tree(self, source: Path, name: str, marker: str) -> None:
        """Put a copy of a directory there: no marker stands while the rest comes and goes."""
        self._clear(name, marker)
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        for path in sorted(files, key=lambda path: path == source / marker):
            self.upload(path, f"{name}/{path.relative_to(source).as_posix()}")

    def put_files(self, files: Mapping[str, bytes], name: str, marker: str) -> None:
        """Put a directory there that holds these files, the marker last."""
        self._clear(name, marker)
        for file in sorted(files, key=lambda file: (file == marker, file)):
            self.write(f"{name}/{file}", files[file])

    def _clear(self, name: str, marker: str) -> None:
        if self.exists(name):
            self.remove(f"{name}/{marker}")
            self.remove(name)

    def _store(self, name: str, put: Callable[[Any, str], None]) -> None:
        def store(connection: _Connection) -> None:
            path, filesystem = self._path(connection, name), connection.filesystem
            if not _renames(filesystem):
                put(filesystem, path)
                return
            directory = posixpath.dirname(path)
            _make_directory(connection, directory)
            staged = posixpath.join(directory, staged_name())
            try:
                put(filesystem, staged)
                _move(connection, staged, path)
            except Exception:
                with suppress(*ftplib.all_errors):  # whoever sweeps the directory finds it
                    filesystem.rm_file(staged)
                raise

        self._run(store)

    def _path(self, connection: _Connection, name: str) -> str:
        root = str(connection.filesystem._strip_protocol(self._url))
        return posixpath.join(root, name) if name else root

    def _run(self, work: Callable[[_Connection], T]) -> T:
        """Do something on this thread's connection, once more on a new one if it was an old one.

        A server hangs up on who is silent for long: that is only noticed on the next command.
        """
        kept = _CONNECTIONS.open.pop(self._key, None)
        if kept is not None:
            try:
                kept.require_alive()
                return self._use(kept, work)
            except FileNotFoundError:
                raise  # an answer, by which the connection is alive
            except Exception as error:  # noqa: BLE001 - what drivers raise has no common root
                reason = without_secrets(repr(error), self._url)
                log.info("%s: asking on a new connection: %s", redacted(self._server), reason)
        return self._use(_connect(self._url), work)

    def _use(self, connection: _Connection, work: Callable[[_Connection], T]) -> T:
        """Do something, and keep the connection if nothing but an answer can be left in it."""
        try:
            result = work(connection)
        except FileNotFoundError:
            self._keep(connection)
            raise
        self._keep(connection)
        return result

    def _keep(self, connection: _Connection) -> None:
        connection.used = time.monotonic()
        _CONNECTIONS.open[self._key] = connection

    @property
    def _key(self) -> tuple[int, str]:
        return os.getpid(), self._server


def redacted(url: str) -> str:
    """A URL as it may be shown and stored: without its password and its query's values."""
    shown = re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", url)
    return re.sub(r"([?&][^=&]*=)[^&]*", r"\1***", shown)


def without_secrets(text: str, url: str) -> str:
    """A text in which the URL's password, should it appear, is hidden."""
    password = urlsplit(url).password
    for secret in filter(None, {password, unquote(password or "")}):
        text = text.replace(secret, "***")
    return text


def _connect(url: str) -> _Connection:
    import fsspec

    # fsspec keeps instances of its own, which would be the ones that have just failed
    filesystem, _ = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return _Connection(filesystem)


def _renames(filesystem: Any) -> bool:
    """Whether its renaming is a command of its own rather than copying and deleting."""
    from fsspec import AbstractFileSystem

    return type(filesystem).mv is not AbstractFileSystem.mv


def _info(connection: _Connection, path: str) -> dict[str, Any] | None:
    """What the server says of a path now; none if nothing is there.

    fsspec's own `exists` takes every failure for absence.
    """
    connection.filesystem.invalidate_cache()
    try:
        info: dict[str, Any] = connection.filesystem.info(path)
    except FileNotFoundError:
        return None
    return info


def _require_absent(connection: _Connection, path: str, cause: BaseException | None) -> None:
    """See that a file that could not be had is really missing; FTP's one answer says too little.

    Raises:
        ConnectionError: the server would not answer at all.
        PermissionError: it is there.
    """
    if not isinstance(cause, ftplib.Error):
        return
    if not isinstance(cause, ftplib.error_perm):
        raise ConnectionError(str(cause)) from cause
    try:
        connection.filesystem.info(path)  # a listing seen before may say at once that it is absent
    except FileNotFoundError:
        return
    if _info(connection, path) is not None:
        raise PermissionError(errno.EACCES, str(cause)) from cause


def _entries(connection: _Connection, path: str) -> list[dict[str, Any]]:
    try:
        found = connection.filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return []
    return [entry for entry in found if entry["name"].strip("/") != path.strip("/")]


def _walk(connection: _Connection, path: str) -> Iterator[dict[str, Any]]:
    """All files below; unlike fsspec's own walk it lets no failure pass for an empty directory."""
    for entry in _entries(connection, path):
        if entry["type"] == "directory":
            yield from _walk(connection, entry["name"])
        else:
            yield entry


def _make_directory(connection: _Connection, path: str) -> None:
    """Make a directory and those above it, while others may be making the same."""
    if path in connection.made or not path.strip("/"):
        return
    if _info(connection, path) is None:
        _make_directory(connection, posixpath.dirname(path))
        try:
            connection.filesystem.mkdir(path, create_parents=False)
        except Exception:
            if _info(connection, path) is None:  # else somebody made it at the same moment
                raise
    connection.made.add(path)


def _move(connection: _Connection, staged: str, path: str) -> None:
    try:
        connection.filesystem.mv(staged, path)
    except Exception:
        if _info(connection, path) is None:
            raise
        connection.filesystem.rm_file(path)  # some servers rename onto nothing but a free name
        connection.filesystem.mv(staged, path)
