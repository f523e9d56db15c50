"""The command on bundles whose adapters are a few floats."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from configs.manifest import BaseEntry, BundleManifest, ExpertCard, LossPoint
from deploy.cli import main
from expert_trainer.bundle import ExpertDraft, open_bundle, publish
from tests.cards import make_card

COMMAND = Path(sys.executable).with_name("introvert")


def card(cluster: int, **changes: object) -> ExpertCard:
    facts = {
        "tokens": 12_345,
        "steps": 90,
        "seed": 1234,
        "target_modules": ["q_proj", "v_proj"],
        "top_terms": ["sea", "boat", "tide"],
        "loss_curve": [LossPoint(step=i, loss=10 / i) for i in range(1, 51)],
        "heldout_loss_expert": 2.125,
        "reason": "2.125 against 2.500",
    }
    return make_card(cluster, **facts | changes)


def publish_cards(root: str | Path, work: Path, cards: Sequence[ExpertCard]) -> BundleManifest:
    router = work / "router"
    router.mkdir(parents=True)
    (router / "router.json").write_text("{}")
    drafts = []
    for number, each in enumerate(cards):
        directory = work / each.id
        directory.mkdir()
        weights = np.full((2, 4), number, dtype=np.float32)
        (directory / "adapter_model.safetensors").write_bytes(save({"a": weights}))
        (directory / "adapter_config.json").write_text('{"r": 2}')
        drafts.append(ExpertDraft(directory, each, 0.5))
    return publish(
        root,
        base=BaseEntry(name="tiny", model="runs/tiny", digest="a" * 64),
        router_dir=router,
        clusters=len(drafts),
        experts=drafts,
        config_digest="c" * 64,
    )


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    held_back = card(1, state="held_back", heldout_loss_base=None, heldout_loss_expert=None)
    publish_cards(tmp_path / "bundle", tmp_path / "work", [card(0), held_back, card(2)])
    return str(tmp_path / "bundle")


def states(bundle: str) -> list[str]:
    return [entry.state for entry in open_bundle(bundle).manifest.experts]


def test_a_table_of_all_experts(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "list", bundle]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    version = open_bundle(bundle).manifest.experts[0].version
    headers = "expert version state tokens base loss expert loss gain top terms"
    assert lines[0].split() == headers.split()
    first = f"expert-0000 {version} admitted 12,345 2.5000 2.1250 0.3750 sea boat tide"
    assert lines[2].split() == first.split()
    assert "held back" in lines[3]
    assert lines[3].count("–") == 3
    assert "3 experts (2 admitted, 1 held back)" in lines[-1]
    assert bundle in lines[-1]
    assert output.err == ""


def test_a_table_of_some(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "list", bundle, "expert-0002"]) == 0
    table = capsys.readouterr().out
    assert "expert-0002" in table
    assert "expert-0000" not in table


def test_a_card_is_readable_and_complete(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert main(["experts", "show", bundle, "expert-0000", "--report", str(report)]) == 0
    text = capsys.readouterr().out
    entry = open_bundle(bundle).manifest.experts[0]
    assert text.splitlines()[0] == entry.served_name
    facts = dict(line.strip().split("  ", 1) for line in text.splitlines()[1:])
    for name in ExpertCard.model_fields:
        assert name == "id" or name.replace("_", " ") in facts, name
    assert facts["seed"].strip() == "1234"
    assert facts["gain"].strip() == "0.375"
    assert facts["target modules"].strip() == "q_proj, v_proj"
    curve = facts["loss curve"].strip().split(", ")
    assert (len(curve), curve[0], curve[-1]) == (8, "10.0000 after 1", "0.2000 after 50")
    content = json.loads(report.read_text())
    assert content["version"] == open_bundle(bundle).manifest.version
    (expert,) = content["experts"]
    assert ExpertCard.model_validate(expert["card"]) == card(0)
    assert (expert["id"], expert["state"], expert["gain"]) == ("expert-0000", "admitted", 0.375)


def test_withdrawn_and_restored(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_bundle(bundle).manifest
    assert main(["experts", "withdraw", bundle, "expert-0000", "expert-0001"]) == 0
    output = capsys.readouterr()
    assert output.out == "expert-0000 is now withdrawn\nexpert-0001 is now withdrawn\n"
    assert f"in place of {before.version}" in output.err
    assert states(bundle) == ["withdrawn", "withdrawn", "admitted"]
    assert main(["experts", "withdraw", bundle, "expert-0000"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("expert-0000 was withdrawn\n", "")
    assert main(["experts", "restore", bundle, "expert-0001", "expert-0000"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "expert-0000 is now admitted",
        "expert-0001 is now held back",
    ]
    assert states(bundle) == ["admitted", "held_back", "admitted"]
    assert open_bundle(bundle).manifest == before


@pytest.mark.parametrize("action", ["list", "show", "withdraw", "restore"])
def test_an_unknown_expert_is_a_usage_error(
    bundle: str, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experts", action, bundle, "expert-0000", "expert-0007"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        f"introvert: {bundle} has no expert-0007; "
        "name one of its experts: expert-0000, expert-0001, expert-0002\n"
    )
    assert states(bundle) == ["admitted", "held_back", "admitted"]


def test_a_config_names_its_bundle(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "list", "demo", "--set", f"bundle.path={bundle}"]) == 0
    assert "expert-0002" in capsys.readouterr().out


def test_a_bundle_behind_a_url(
    tmp_path: Path, ftp_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_cards(ftp_url, tmp_path / "work", [card(0), card(1)])
    report = tmp_path / "report.json"
    assert main(["experts", "list", ftp_url, "--report", str(report)]) == 0
    assert main(["experts", "withdraw", ftp_url, "expert-0001"]) == 0
    assert states(ftp_url) == ["admitted", "withdrawn"]
    assert main(["experts", "show", ftp_url, "expert-0009"]) == 2
    output = capsys.readouterr()
    assert "open-sesame" not in output.out + output.err + report.read_text()
    assert "introvert:***@" in output.out
    assert "introvert:***@" in output.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["list"], 2, "CONFIG_OR_BUNDLE"),
        (["show", "demo"], 2, "ID"),
        (["list", "no-such-config"], 2, "no-such-config"),
        (["list", ".", "--set", "seed=3"], 2, "is no config"),
        (["list", "."], 1, "is not published"),
        (["list", "nosuch://host/dir"], 1, "fsspec"),
        (["rename", "demo"], 2, "rename"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(
    arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [COMMAND, "experts", *arguments], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
