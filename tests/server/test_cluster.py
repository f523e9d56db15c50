"""What the driver checks before it starts anything; the rest is in tests/end_to_end."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from expert_trainer.errors import NotPublishedError
from server.cluster import Cluster, check_port
from server.errors import PortTakenError, ServingConfigError


def config(tmp_path: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "bundle": {"path": str(tmp_path / "bundle")},
            "base": {"model": str(tmp_path / "base")},
            "data": {"train": ["x.jsonl"]},
            **sections,
        }
    )


def test_a_taken_port_is_named_with_the_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(PortTakenError) as refusal:
            check_port(config(tmp_path, gateway={"port": port}))
    assert str(refusal.value) == (
        f"port {port} on 127.0.0.1 is taken by another process; "
        "stop it or choose another with --set gateway.port=…"
    )


def test_any_free_port_will_do(tmp_path: Path) -> None:
    check_port(config(tmp_path, gateway={"port": 0}))


@pytest.mark.parametrize("host", ["192.0.2.77", "no.such.host.invalid"])
def test_a_host_that_is_not_here_is_named(tmp_path: Path, host: str) -> None:
    with pytest.raises(ServingConfigError, match=f"cannot listen on {host}:8000"):
        check_port(config(tmp_path, gateway={"host": host}))


def test_without_a_bundle_nothing_is_started(tmp_path: Path) -> None:
    with pytest.raises(NotPublishedError, match="run `introvert train` first"):
        Cluster(config(tmp_path, gateway={"port": 0})).__enter__()
    assert list(tmp_path.iterdir()) == []
