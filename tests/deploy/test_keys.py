"""`introvert keys`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.cli import main
from server.gateway.tenants import Keyring
from server.keys import read_keys


def test_a_key_is_shown_once_and_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    where = ["--file", str(file)]
    limits = ["--requests-per-minute", "60", "--concurrent", "4", "--weight", "2"]
    assert main(["keys", "new", "alice", *where, *limits, "--experts", "expert-0001", "base"]) == 0
    out = capsys.readouterr()
    key = out.out.strip()
    assert len(key) > 40
    assert key not in file.read_text()
    tenant = Keyring(file).identify([(b"x-api-key", key.encode())])
    assert (tenant.name, tenant.weight, tenant.concurrent) == ("alice", 2, 4)
    assert tenant.requests_per_minute == 60
    assert tenant.experts == {"expert-0001", "base"}

    assert main(["keys", "new", "bob", *where]) == 0
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert main(["keys", "list", *where, "--report", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0] == "alice"
    assert lines[3].split()[-1] == "all"
    assert [entry["name"] for entry in json.loads(report.read_text())["keys"]] == ["alice", "bob"]

    assert main(["keys", "revoke", "alice", *where]) == 0
    assert [entry.name for entry in read_keys(file)] == ["bob"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["new", "a b"], "name: "),
        (["new", "a", "--concurrent", "0"], "concurrent: "),
        (["new", "a", "--requests-per-minute", "-1", "--weight", "0"], "weight: "),
        (["revoke", "a"], "cannot be read"),
        (["list"], "cannot be read"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    file = tmp_path / "keys.yaml"
    assert main(["keys", *arguments, "--file", str(file)]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert captured.out == ""
    assert not file.exists()
