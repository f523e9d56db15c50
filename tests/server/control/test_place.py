from __future__ import annotations

from pathlib import Path

import pytest

from server.control.errors import ForbiddenPlaceError
from server.control.place import place_beside


@pytest.mark.parametrize(
    "asked", ["/data/bundle", "/data/bundle-2", "/data//bundle-2/", "/data/.b"]
)
def test_a_bundle_beside_the_configured_one_may_be_named(asked: str) -> None:
    assert Path(place_beside("/data/bundle", asked)).parent == Path("/data")


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "/",
        "/data",
        "/data/..",
        "/data/../etc",
        "/data/x/bundle",
        "/data/x/../bundle",
        "/etc/passwd",
        "bundle",
        "../data/bundle",
        "file:///data/bundle",
        "/data/b\0c",
    ],
)
def test_no_other_path_may(asked: str) -> None:
    with pytest.raises(ForbiddenPlaceError, match="does not lie beside"):
        place_beside("/data/bundle", asked)


def test_a_relative_bundle_and_one_behind_a_link_have_their_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "link")
    assert place_beside("bundle", str(tmp_path / "real" / "next")) == str(tmp_path / "real/next")
    configured = str(tmp_path / "link" / "bundle")
    for near in ("real", "link"):
        assert place_beside(configured, str(tmp_path / near / "next"))


URL = "ftp://me:secret@host/runs/bundle"


@pytest.mark.parametrize("before", ["ftp://me:secret@host/runs", "ftp://me:***@host/runs"])
def test_behind_a_url_the_password_need_not_be_known(before: str) -> None:
    assert place_beside(URL, f"{before}/next") == "ftp://me:secret@host/runs/next"


@pytest.mark.parametrize(
    "asked",
    [
        "ftp://me:secret@host/runs/..",
        "ftp://me:secret@host/runs/a/b",
        "ftp://me:secret@host/runs/%2e%2e",
        "ftp://me:secret@host/runs/next?x=1",
        "ftp://me:secret@elsewhere/runs/next",
        "ftp://host/runs/next",
        "/runs/next",
    ],
)
def test_other_urls_are_refused_and_no_password_is_told(asked: str) -> None:
    with pytest.raises(ForbiddenPlaceError) as refusal:
        place_beside(URL, asked)
    assert "secret" not in str(refusal.value)
