from pathlib import Path
from typing import Any

import pytest

from deploy.demo.stages import Stages, digest


def counting(calls: list[int], output: Path) -> Any:
    def make() -> dict[str, Any]:
        calls.append(1)
        output.write_text("made")
        return {"calls": len(calls)}

    return make


def test_a_finished_stage_is_reused_by_the_next_run(tmp_path: Path) -> None:
    calls: list[int] = []
    output = tmp_path / "output"
    first, second = Stages(tmp_path), Stages(tmp_path)
    assert first.once("s", "key", [output], counting(calls, output)) == {"calls": 1}
    assert second.once("s", "key", [output], counting(calls, output)) == {"calls": 1}
    assert first.reused == []
    assert second.reused == ["s"]
    assert set(second.seconds) == {"s"}


@pytest.mark.parametrize("change", ["key", "output", "stamp"])
def test_a_stage_is_made_anew_when_anything_it_rests_on_changed(
    tmp_path: Path, change: str
) -> None:
    calls: list[int] = []
    output = tmp_path / "output"
    stages = Stages(tmp_path)
    stages.once("s", "key", [output], counting(calls, output))
    if change == "output":
        output.unlink()
    if change == "stamp":
        (tmp_path / "s.stage.json").write_text("half a sta")
    stages.once("s", "other" if change == "key" else "key", [output], counting(calls, output))
    assert len(calls) == 2


def test_a_stage_that_fails_leaves_no_stamp(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Stages(tmp_path).once("s", "key", [], fail)
    assert list(tmp_path.iterdir()) == []


def test_digest_tells_its_parts_apart() -> None:
    assert digest("a", "b") == digest("a", "b")
    assert digest("a", "b") != digest("ab")
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1})
