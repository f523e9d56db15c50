from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

from configs.schema import RunConfig
from server.lodging import keep, make_run_dir
from server.table import ENGINE_KEY_FILE


def config(here: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "bundle": {"path": str(here / "bundle"), "work_dir": str(here / "work")},
            "base": {"model": "unused"},
            "data": {"train": ["unused.jsonl"]},
        }
    )


def test_a_run_has_a_directory_and_a_secret_that_are_its_owners_alone(tmp_path: Path) -> None:
    keys = set()
    for kind in ("serving", "batch"):
        with ExitStack() as stack:
            run_dir = make_run_dir(config(tmp_path), stack, kind)
            key = run_dir / ENGINE_KEY_FILE
            assert run_dir.stat().st_mode & 0o777 == 0o700
            assert key.stat().st_mode & 0o777 == 0o600
            keys.add(key.read_text())
        assert not run_dir.exists()
    assert len(keys) == 2
    assert min(map(len, keys)) > 40


def test_a_keeper_goes_on_after_a_failure_and_ends_with_the_block() -> None:
    looks = threading.Semaphore(0)
    ending = threading.Event()

    def look() -> None:
        looks.release()
        raise OSError("no process to be had")

    with ExitStack() as stack:
        keep(stack, "keeper", look, ending)
        assert looks.acquire(timeout=60)
        assert looks.acquire(timeout=60)
    assert ending.is_set()
    assert all(thread.name != "keeper" for thread in threading.enumerate())
