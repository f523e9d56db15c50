import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from configs.manifest import ExpertCard
from deploy.tensorboard import TensorBoard, run_directory
from expert_trainer.types import (
    ExpertFailed,
    ExpertFinished,
    ExpertMeasured,
    ExpertProgress,
    ExpertStarted,
    JobFinished,
    PoolStarted,
)

Points = dict[str, list[tuple[int, float]]]


def read(folder: Path) -> Points:
    """All scalars of a run's one event file, every checksum checked."""
    (path,) = folder.iterdir()
    data, events = path.read_bytes(), []
    while data:
        length, check = struct.unpack_from("<QI", data)
        assert check == masked_crc32c(data[:8])
        body, (check,) = data[12 : 12 + length], struct.unpack_from("<I", data, 12 + length)
        assert check == masked_crc32c(body)
        events.append(Event.FromString(body))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    points: Points = defaultdict(list)
    for event in events[1:]:
        for value in event.summary.value:
            points[value.tag].append((event.step, round(value.simple_value, 4)))
    return points


def test_every_expert_has_its_curves(
    tmp_path: Path, clock: Any, make_card: Callable[..., ExpertCard]
) -> None:
    with TensorBoard(tmp_path, clock=clock) as board:
        board(PoolStarted(2, 1, 20))
        for name in ("expert-0001", "expert-0002"):
            board(ExpertStarted(name, "a", 10, 1))
            clock.now += 3.0
            board(ExpertProgress(name, "a", 4, 10, 2.5, 400, 100.0))
            clock.now += 3.0
            board(ExpertMeasured(name, 5, 2.25))
            board(ExpertProgress(name, "a", 8, 10, 2.0, 800, 110.0))
            board(ExpertFinished(name, make_card(name)))
    points = read(tmp_path / "expert-0001")
    assert points["loss/train"] == [(4, 2.5), (8, 2.0)]
    assert points["loss/heldout"] == [(5, 2.25), (10, 2.7)]
    assert points["tokens"] == [(4, 400), (8, 800), (10, 1000)]
    assert points["tokens_per_second"] == [(4, 100), (8, 110)]
    assert read(tmp_path / "expert-0002").keys() == points.keys()
    everything = read(tmp_path / "all")
    assert everything["experts/done"][-1] == (12, 2.0)
    assert everything["tokens_per_second"][-1][1] > 0


def test_curves_are_on_disk_while_training_goes_on(tmp_path: Path, clock: Any) -> None:
    board = TensorBoard(tmp_path, clock=clock)
    board(ExpertProgress("expert-0001", "a", 1, 10, 2.5, 100, 100.0))
    assert not (tmp_path / "expert-0001").exists()
    clock.now = 6.0
    board(ExpertProgress("expert-0001", "a", 2, 10, 2.4, 200, 100.0))
    assert len(read(tmp_path / "expert-0001")["loss/train"]) == 2


def test_thousands_of_experts_keep_no_file_open(tmp_path: Path, clock: Any) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    board = TensorBoard(tmp_path, clock=clock)
    for index in range(1500):
        board(ExpertProgress(f"expert-{index:04d}", "a", 1, 10, 2.5, 100, 100.0))
    clock.now = 6.0
    board(ExpertProgress("expert-0000", "a", 2, 10, 2.4, 200, 100.0))
    assert len(list(tmp_path.iterdir())) == 1501
    assert len(list(descriptors.iterdir())) <= before + 1


def test_jobs_with_any_name_and_failures_are_written_too(tmp_path: Path, clock: Any) -> None:
    with TensorBoard(tmp_path, clock=clock) as board:
        board(PoolStarted(2, 1, 20))
        board(ExpertStarted("measure one/two", "a", 10, 1))
        board(ExpertProgress("measure one/two", "a", 1, 10, 2.5, 100, 100.0))
        board(JobFinished("measure one/two", None))
        board(ExpertStarted("x", "a", 10, 1))
        board(ExpertFailed("x", "nan", 3, final=True))
    assert (tmp_path / "measure-one-two").is_dir()
    assert read(tmp_path / "all")["experts/failed"][-1][1] == 1


def test_a_full_disk_ends_the_curves_and_not_the_training(
    tmp_path: Path, clock: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with TensorBoard(blocked, clock=clock) as board:
        for step in range(1, 4):
            clock.now += 6.0
            board(ExpertProgress("expert-0001", "a", step, 10, 2.5, 100, 100.0))
    assert capsys.readouterr().err.count("no more event files for TensorBoard") == 1


def test_runs_have_directories_of_their_own(tmp_path: Path) -> None:
    directory = run_directory(tmp_path)
    assert directory.parent == tmp_path / "tensorboard"
    assert not directory.exists(), "a run without events leaves nothing"


def test_tensorboard_is_loaded_when_the_first_point_comes() -> None:
    program = (
        "import sys, deploy.tensorboard, pathlib\n"
        "with deploy.tensorboard.TensorBoard(pathlib.Path('none')): pass\n"
        "print('tensorboardX' in sys.modules, pathlib.Path('none').exists())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "False"]
