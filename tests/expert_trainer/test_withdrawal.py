import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from configs.manifest import MANIFEST_FILE
from expert_trainer.bundle import open_bundle
from expert_trainer.errors import NotPublishedError, UnknownExpertError
from expert_trainer.storage import Storage
from expert_trainer.withdrawal import restore, withdraw


def _neighbour(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bundles = _neighbour("test_bundle")


@pytest.fixture(params=["disk", "ftp"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage(tmp_path / "bundle")
    return Storage(request.getfixturevalue("ftp_url"))


def content(root: Storage) -> dict[str, bytes]:
    names = [name for name in root.files() if name not in {MANIFEST_FILE, ".publish.lock"}]
    return {name: root.read(name) for name in names}


def states(root: Storage) -> list[str]:
    return [entry.state for entry in open_bundle(root).manifest.experts]


def test_only_the_manifest_changes_and_only_in_state_version_and_digest(
    root: Storage, tmp_path: Path
) -> None:
    before = bundles.publish_values(root, tmp_path / "work", [1.0, 2.0, 3.0]).manifest
    files = content(root)
    after = withdraw(root, ["expert-0001"])
    assert open_bundle(root).manifest == after
    assert states(root) == ["admitted", "withdrawn", "admitted"]
    assert [entry.id for entry in after.served] == ["expert-0000", "expert-0002"]
    assert after.version != before.version
    assert after.digest != before.digest
    changed = {"experts", "version", "digest"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert content(root) == files
    sealed = root.read(MANIFEST_FILE)
    assert withdraw(root, ["expert-0001"]) == after
    assert root.read(MANIFEST_FILE) == sealed
    assert restore(root, ["expert-0001"]) == before
    assert open_bundle(root).manifest == before


def test_restoring_gives_the_gates_state_back_and_nothing_more(tmp_path: Path) -> None:
    root = Storage(tmp_path / "bundle")
    drafts = [bundles.make_draft(tmp_path, 0, state="held_back"), bundles.make_draft(tmp_path, 1)]
    bundles.publish(
        root,
        base=bundles.BASE,
        router_dir=bundles.make_router(tmp_path),
        clusters=2,
        experts=drafts,
        config_digest="c" * 64,
    )
    withdraw(root, ["expert-0000", "expert-0001"])
    assert states(root) == ["withdrawn", "withdrawn"]
    restore(root, ["expert-0001", "expert-0000"])
    assert states(root) == ["held_back", "admitted"]


def test_a_withdrawal_holds_for_the_version(tmp_path: Path) -> None:
    root, work = Storage(tmp_path / "bundle"), tmp_path / "work"
    bundles.publish_values(root, work, [1.0, 2.0])
    withdraw(root, ["expert-0000", "expert-0001"])
    bundles.publish_values(root, work, [1.0, 3.0])
    assert states(root) == ["withdrawn", "admitted"]
    kept = open_bundle(root).manifest.experts[:1]
    bundles.publish_one(root, bundles.make_draft(work, 1, 4.0), kept)
    assert states(root) == ["withdrawn", "admitted"]


def test_nothing_changes_for_an_unknown_expert(root: Storage, tmp_path: Path) -> None:
    bundles.publish_values(root, tmp_path / "work", [1.0] * 14)
    before = root.read(MANIFEST_FILE)
    with pytest.raises(UnknownExpertError, match=r"no expert-0099; .* expert-0011 and 2 more$"):
        withdraw(root, ["expert-0000", "expert-0099"])
    assert root.read(MANIFEST_FILE) == before


def test_without_a_bundle_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(NotPublishedError):
        withdraw(tmp_path / "nowhere", ["expert-0000"])
    assert not (tmp_path / "nowhere").exists()
