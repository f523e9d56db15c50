"""Sockets that the gateway processes listen on, and how the Unix ones among them are reached.

The driver binds one TCP socket for each process to the same port and keeps it: what connects while
a process is dead waits in the socket's backlog for the next. Knows nothing of HTTP.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.errors import PortTakenError, ServingConfigError

BACKLOG = 2048
SHORT_PATH = 100
"""Longest path, bytes, that a Unix socket's address surely holds (it has room for 107)."""


def listen(host: str, port: int, count: int = 1) -> list[socket.socket]:
    """Sockets that listen on one port; the kernel spreads connections over them.

    Args:
        host: an address of this machine.
        port: 0 takes a free one.
        count: sockets.

    Raises:
        PortTakenError: another process listens there.
        ServingConfigError: the address cannot be listened on.
    """
    # Without SO_REUSEPORT first: with it, another endpoint of this user on the same port would
    # not be noticed, and each of the two would get some of the other's requests.
    alone = _bound(host, port, shared=False)
    if count == 1:
        alone.listen(BACKLOG)
        return [alone]
    port = alone.getsockname()[1]
    alone.close()
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sockets.append(_bound(host, port, shared=True))
            sockets[-1].listen(BACKLOG)
    except ServingConfigError:
        for one in sockets:
            one.close()
        raise
    return sockets


def url_of(host: str, listening: socket.socket) -> str:
    """URL under which a client on this machine reaches a socket."""
    port = listening.getsockname()[1]
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = anywhere.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen_at(path: Path) -> socket.socket:
    """A Unix socket that listens at a path, for this user alone; what lay there goes.

    Raises:
        ServingConfigError: the path cannot be listened at.
    """
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with reachable(path) as address:
            listening.bind(address)
        path.chmod(0o600)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ServingConfigError(f"cannot listen at {path}: {error.strerror}") from None
    return listening


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """The address of a Unix socket, short enough for the kernel however deep the path is.

    Valid inside the context only.

    Raises:
        OSError: the directory is not there.
    """
    if len(os.fsencode(path)) <= SHORT_PATH:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _bound(host: str, port: int, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(host, port) from None
        raise ServingConfigError(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; "
            "choose another 'gateway.host' or 'gateway.port'"
        ) from None
    return made
