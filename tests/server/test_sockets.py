"""Sockets on one port, and Unix sockets at deep paths."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from server.errors import ServingConfigError
from server.sockets import listen, listen_at, reachable, url_of


@pytest.mark.parametrize(
    ("host", "family", "url"),
    [
        ("127.0.0.1", socket.AF_INET, "http://127.0.0.1:"),
        ("0.0.0.0", socket.AF_INET, "http://127.0.0.1:"),
        ("::1", socket.AF_INET6, "http://[::1]:"),
    ],
)
def test_the_url_is_one_that_a_client_can_use(
    host: str, family: socket.AddressFamily, url: str
) -> None:
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        assert url_of(host, listening) == f"{url}{listening.getsockname()[1]}"


@pytest.mark.parametrize("count", [1, 3])
def test_sockets_share_a_port_and_take_its_connections_between_them(count: int) -> None:
    sockets = listen("127.0.0.1", 0, count)
    clients = []
    try:
        assert len({one.getsockname() for one in sockets}) == 1
        for _ in range(10):
            clients.append(socket.create_connection(sockets[0].getsockname(), 60))
        accepted = 0
        for one in sockets:
            one.setblocking(False)
            try:
                while True:
                    one.accept()[0].close()
                    accepted += 1
            except BlockingIOError:
                continue
        assert accepted == 10
    finally:
        for one in [*sockets, *clients]:
            one.close()


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ServingConfigError, match=r"gateway\.host"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize("depth", [0, 8])
def test_unix_sockets_however_deep_their_directory(tmp_path: Path, depth: int) -> None:
    directory = tmp_path.joinpath(*["a-rather-long-name"] * depth)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "a.sock"
    path.touch()  # what a killed process left
    with listen_at(path), socket.socket(socket.AF_UNIX) as client:
        with reachable(path) as address:
            client.connect(address)
        assert path.stat().st_mode & 0o777 == 0o600
