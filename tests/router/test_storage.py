from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.schema import RouterConfig
from router.calibration import calibrate
from router.errors import RouterFormatError
from router.storage import (
    CENTROIDS_FILE,
    RECORD_FILE,
    STUDENT_FILE,
    RouterRecord,
    read_router,
    read_student,
    write_router,
)

CENTROIDS = np.eye(3, 4, dtype=np.float32)
RECORD = RouterRecord(
    embedder="words",
    embedder_digest="abc",
    dimension=4,
    clusters=3,
    config=RouterConfig(clusters=3),
    calibration=calibrate([0.1, 0.2, 1 / 3], 0.5),
    seed=7,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_router(tmp_path / "router", RECORD, CENTROIDS)
    return tmp_path / "router"


def test_what_is_written_is_read(saved: Path) -> None:
    record, centroids = read_router(saved)
    assert record == RECORD
    assert centroids.dtype == np.float32
    np.testing.assert_array_equal(centroids, CENTROIDS)


def test_the_same_router_is_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    write_router(tmp_path / "again", RECORD, CENTROIDS)
    for name in (RECORD_FILE, CENTROIDS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_nothing_else_is_left_in_the_directory(saved: Path) -> None:
    write_router(saved, RECORD, CENTROIDS)
    assert sorted(path.name for path in saved.iterdir()) == [CENTROIDS_FILE, RECORD_FILE]


@pytest.mark.parametrize("name", [RECORD_FILE, CENTROIDS_FILE])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(RouterFormatError, match=f"{name} is missing.*introvert fit"):
        read_router(saved)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(RouterFormatError, match="nowhere"):
        read_router(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [RECORD_FILE, CENTROIDS_FILE])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\x00", b"\x08\0\0\0\0\0\0\0notjson!"])
def test_a_damaged_file_is_named(saved: Path, name: str, content: bytes) -> None:
    (saved / name).write_bytes(content)
    with pytest.raises(RouterFormatError, match=f"{name} is damaged"):
        read_router(saved)


def test_another_format_says_which(saved: Path) -> None:
    tree = json.loads((saved / RECORD_FILE).read_text())
    (saved / RECORD_FILE).write_text(json.dumps({**tree, "format": 2}))
    with pytest.raises(RouterFormatError, match=r"has format 2.*reads format 1"):
        read_router(saved)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: CENTROIDS[:2],
        lambda: CENTROIDS[:, :3],
        lambda: 2 * CENTROIDS,
        lambda: np.full_like(CENTROIDS, np.nan),
        lambda: CENTROIDS.astype(np.float64),
        CENTROIDS.ravel,
    ],
)
def test_centroids_that_do_not_fit_the_record(saved: Path, wrong: Callable[[], Any]) -> None:
    save_file({"centroids": np.ascontiguousarray(wrong())}, saved / CENTROIDS_FILE)
    with pytest.raises(RouterFormatError, match="does not hold 3 unit vectors of 4 dimensions"):
        read_router(saved)


def test_centroids_under_another_name(saved: Path) -> None:
    save_file({"weights": CENTROIDS}, saved / CENTROIDS_FILE)
    with pytest.raises(RouterFormatError, match="is damaged"):
        read_router(saved)


STUDENT = {"weights": np.arange(6, dtype=np.float32).reshape(2, 3), "keys": np.arange(3)}


def test_a_student_lies_beside(saved: Path) -> None:
    write_router(saved, RECORD, CENTROIDS, STUDENT)
    found = read_student(saved)
    assert found.keys() == STUDENT.keys()
    for name, array in STUDENT.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_a_router_without_a_student_leaves_none_of_an_earlier_one(saved: Path) -> None:
    write_router(saved, RECORD, CENTROIDS, STUDENT)
    write_router(saved, RECORD, CENTROIDS)
    assert not (saved / STUDENT_FILE).exists()


def test_a_student_that_is_missing_or_damaged_is_named(saved: Path) -> None:
    with pytest.raises(RouterFormatError, match=r"student\.safetensors is missing"):
        read_student(saved)
    (saved / STUDENT_FILE).write_bytes(b"{}")
    with pytest.raises(RouterFormatError, match=r"student\.safetensors is damaged"):
        read_student(saved)


def test_a_record_of_before_there_were_students_is_read(saved: Path) -> None:
    tree = json.loads((saved / RECORD_FILE).read_text())
    del tree["student"]
    (saved / RECORD_FILE).write_text(json.dumps(tree))
    assert read_router(saved)[0].student is None
