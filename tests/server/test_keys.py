"""The file of API keys."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from server.errors import KeysError
from server.keys import KEY_PREFIX, KeyEntry, add_key, digest_of, new_key, read_keys, remove_key

DIGEST = "ab" * 32


def test_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) >= 43 + len(KEY_PREFIX) for key in keys)


def test_entries_are_added_and_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.yaml"
    for number, name in enumerate(("a", "b", "c")):
        add_key(path, KeyEntry(name=name, sha256=digest_of(str(number)).hex(), weight=number + 1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in read_keys(path)] == ["a", "b", "c"]
    remove_key(path, "b")
    assert [(entry.name, entry.weight) for entry in read_keys(path)] == [("a", 1), ("c", 3)]
    assert path.read_text().startswith("# API keys")


def test_what_a_person_wrote_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"# mine\n- name: a   # the first\n  sha256: {DIGEST}")
    path.chmod(0o640)
    add_key(path, KeyEntry(name="b", sha256="cd" * 32))
    text = path.read_text()
    assert "# mine" in text
    assert "# the first" in text
    assert [entry.name for entry in read_keys(path)] == ["a", "b"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_entries_on_one_line_are_taken_out_too(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    entries = [{"name": n, "sha256": d * 32} for n, d in (("a", "ab"), ("b", "cd"))]
    path.write_text(yaml.safe_dump(entries, default_flow_style=True, width=10_000))
    remove_key(path, "a")
    assert [entry.name for entry in read_keys(path)] == ["b"]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"- name: a\n  sha256: {DIGEST}\n"
        "- name: b\n  sha256: secret\n  rate: 3\n"
        "- just text\n"
        f"- name: a\n  sha256: {'cd' * 32}\n"
        f"- name: d\n  sha256: {DIGEST}\n"
    )
    with pytest.raises(KeysError) as caught:
        read_keys(path)
    text = str(caught.value)
    for part in ("line 3 (b): sha256:", "line 3 (b): rate:", "line 6: ", "a: there are two"):
        assert part in text
    assert "d: it is the key of a as well" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "is no YAML"),
        ("- name: 2026-02-31", "is no YAML"),
        ("a: 1", "a list of keys is expected"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysError, match=reason):
        read_keys(path)
    with pytest.raises(KeysError, match=reason):
        add_key(path, KeyEntry(name="a", sha256=DIGEST))
    assert path.read_text() == text


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    add_key(path, KeyEntry(name="a", sha256=DIGEST))
    with pytest.raises(KeysError, match="already"):
        add_key(path, KeyEntry(name="a", sha256="cd" * 32))
    with pytest.raises(KeysError, match="it has: a"):
        remove_key(path, "b")


def test_an_empty_file_has_no_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("# nothing yet\n")
    assert read_keys(tmp_path / "keys.yaml") == []


@pytest.mark.parametrize("limit", ["weight: .inf", "weight: .nan", "requests_per_minute: 1.0e-9"])
def test_numbers_that_nothing_can_be_shared_by(tmp_path: Path, limit: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"- name: a\n  sha256: {DIGEST}\n  {limit}\n")
    with pytest.raises(KeysError, match=limit.partition(":")[0]):
        read_keys(path)
