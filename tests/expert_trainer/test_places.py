import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import BundleConfig, RunConfig
from expert_trainer.errors import PlaceError, RunningError
from expert_trainer.fitting import fit
from expert_trainer.places import require_places, run_lock
from expert_trainer.training import train


def test_places_are_made_and_left_empty(tmp_path: Path) -> None:
    config = BundleConfig(path=str(tmp_path / "runs" / "bundle"))
    require_places(config)
    require_places(config)
    assert sorted((tmp_path / "runs").rglob("*")) == [Path(config.path), Path(config.work)]


def test_places_behind_urls_are_made(
    tmp_path: Path, ftp_url: str, ftp_server: tuple[str, Path]
) -> None:
    config = BundleConfig(
        path=f"{ftp_url}/bundle", work_dir=f"{ftp_url}/work", scratch_dir=str(tmp_path / "scratch")
    )
    require_places(config)
    shown = ftp_server[1] / tmp_path.parent.name / tmp_path.name
    assert sorted(path.name for path in shown.rglob("*")) == ["bundle", "work"]
    assert (tmp_path / "scratch").is_dir()


def test_a_place_that_takes_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlaceError, match=r"^/proc cannot be written to .* bundle\.work_dir"):
        require_places(BundleConfig(path=str(tmp_path), work_dir="/proc"))


def test_an_unreachable_place_is_named_without_its_password(tmp_path: Path) -> None:
    config = BundleConfig(path=str(tmp_path), work_dir="ftp://me:hush-hush@127.0.0.1:9/work")
    with pytest.raises(PlaceError, match=r"^ftp://me:\*\*\*@127.* refused.* bundle\.work_dir"):
        require_places(config)


@pytest.mark.parametrize("key", ["path", "work_dir"])
@pytest.mark.parametrize("use_case", [fit, train])
def test_a_bad_place_is_found_out_before_any_work(
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    key: str,
    use_case: Callable[[RunConfig], object],
) -> None:
    (tmp_path / "file").write_text("in the way")
    config = make_config()
    bundle = config.bundle.model_copy(update={key: str(tmp_path / "file" / "below")})
    data = config.data.model_copy(update={"train": ["nowhere.jsonl"]})  # any work would fail here
    with pytest.raises(PlaceError, match=rf"file/below.* cannot be written to .* bundle\.{key}"):
        use_case(config.model_copy(update={"bundle": bundle, "data": data}))


HOLDER = """
import sys, time
from configs.schema import BundleConfig
from expert_trainer.places import run_lock
with run_lock(BundleConfig(path=sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_of_the_first_until_that_one_dies(tmp_path: Path) -> None:
    config = BundleConfig(path=str(tmp_path / "bundle"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, config.path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunningError, match=rf"process {holder.pid} is at work in .*\.work"):
            run_lock(config).__enter__()
        with run_lock(BundleConfig(path=str(tmp_path / "another"))):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with run_lock(config), run_lock(config):  # one use case inside another
            pass
        with run_lock(config):
            pass


def test_a_lock_that_cannot_be_taken_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = BundleConfig(path=str(tmp_path), scratch_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(PlaceError, match=r"bundle\.scratch_dir"):
        run_lock(config).__enter__()
