import hashlib
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from configs.manifest import (
    MANIFEST_FILE,
    BaseEntry,
    ExpertEntry,
)
from expert_trainer.bundle import Bundle, ExpertDraft, open_bundle, publish, router_version
from expert_trainer.errors import (
    BundleError,
    DamagedBundleError,
    NotPublishedError,
    StaleBundleError,
    StorageError,
)
from expert_trainer.storage import Storage
from tests.cards import make_card

BASE = BaseEntry(name="tiny", model="runs/tiny", digest="a" * 64)


def make_draft(root: Path, cluster: int, value: float = 0.0, **changes: object) -> ExpertDraft:
    directory = root / f"expert-{cluster:04d}"
    directory.mkdir(parents=True, exist_ok=True)
    weights = np.full((2, 4), value, dtype=np.float32)
    (directory / "adapter_model.safetensors").write_bytes(save({"a": weights}))
    (directory / "adapter_config.json").write_text(json.dumps({"r": 2}))
    return ExpertDraft(directory=directory, card=make_card(cluster, **changes), mass=0.5)


def make_router(root: Path, content: str = "{}") -> Path:
    directory = root / "router"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "router.json").write_text(content)
    return directory


@pytest.fixture(params=["disk", "ftp"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Where a bundle is to be published."""
    if request.param == "disk":
        return Storage(tmp_path / "bundle")
    return Storage(request.getfixturevalue("ftp_url"))


def publish_values(
    root: Path | Storage, work: Path, values: list[float], cache: Path | None = None
) -> Bundle:
    drafts = [make_draft(work, cluster, value) for cluster, value in enumerate(values)]
    router = make_router(work)
    publish(
        root,
        base=BASE,
        router_dir=router,
        clusters=len(values),
        experts=drafts,
        config_digest="c" * 64,
    )
    return open_bundle(root, cache=cache or work / "cache")


def files_of(bundle: Bundle) -> list[Path]:
    directories = [bundle.router_dir, *map(bundle.expert_dir, bundle.manifest.experts)]
    files = [path for directory in directories for path in directory.iterdir()]
    return [bundle.root / MANIFEST_FILE, *sorted(files)]


def test_what_is_published_is_what_is_opened(root: Storage, tmp_path: Path) -> None:
    bundle = publish_values(root, tmp_path / "work", [1.0, 2.0])
    assert [entry.id for entry in bundle.manifest.experts] == ["expert-0000", "expert-0001"]
    entry = bundle.manifest.experts[1]
    assert bundle.card(entry) == make_card(1)
    weights = (bundle.expert_dir(entry) / "adapter_model.safetensors").read_bytes()
    assert weights == (tmp_path / "work/expert-0001/adapter_model.safetensors").read_bytes()
    assert (bundle.router_dir / "router.json").read_text() == "{}"
    assert [card.cluster for card in bundle.cards(bundle.manifest.experts)] == [0, 1]


def test_drafts_and_router_may_lie_behind_a_url(tmp_path: Path, ftp_url: str) -> None:
    draft, router = make_draft(tmp_path, 0, 3.0), make_router(tmp_path)
    work = Storage(ftp_url)
    work.put_tree(draft.directory, "experts/expert-0000", marker="adapter_config.json")
    work.put_tree(router, "router", marker="router.json")
    publish(
        tmp_path / "bundle",
        base=BASE,
        router_dir=work / "router",
        clusters=1,
        experts=[ExpertDraft(work / "experts/expert-0000", draft.card, 0.5)],
        config_digest="c" * 64,
    )
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.router.version == router_version(work / "router")
    published = bundle.expert_dir(bundle.manifest.experts[0]) / "adapter_model.safetensors"
    assert published.read_bytes() == (draft.directory / "adapter_model.safetensors").read_bytes()


def test_versions_are_content_hashes(tmp_path: Path) -> None:
    first = publish_values(tmp_path / "one", tmp_path / "work", [1.0, 2.0])
    again = publish_values(tmp_path / "two", tmp_path / "work", [1.0, 2.0])
    other = publish_values(tmp_path / "three", tmp_path / "work", [1.0, 3.0])
    versions = [[entry.version for entry in b.manifest.experts] for b in (first, again, other)]
    assert versions[0] == versions[1]
    assert versions[2][0] == versions[0][0]
    assert versions[2][1] != versions[0][1]
    assert first.manifest.version == again.manifest.version != other.manifest.version


def test_an_unchanged_expert_is_not_written_again(tmp_path: Path) -> None:
    root, work = tmp_path / "bundle", tmp_path / "work"
    before = publish_values(root, work, [1.0, 2.0])
    kept = before.expert_dir(before.manifest.experts[0])
    inode = kept.stat().st_ino
    after = publish_values(root, work, [1.0, 3.0])
    assert after.expert_dir(after.manifest.experts[0]) == kept
    assert kept.stat().st_ino == inode
    assert before.expert_dir(before.manifest.experts[1]).is_dir(), "an older version stays"


def publish_one(root: Storage, draft: ExpertDraft, keep: list[ExpertEntry]) -> Bundle:
    publish(
        root,
        base=BASE,
        router_dir=make_router(draft.directory.parent),
        clusters=3,
        experts=[draft],
        config_digest="d" * 64,
        keep=keep,
    )
    return open_bundle(root, cache=draft.directory.parent / "cache")


def test_kept_experts_stay_untouched_and_need_no_draft(root: Storage, tmp_path: Path) -> None:
    before = publish_values(root, tmp_path / "work", [1.0, 2.0, 3.0])
    first, second, third = before.manifest.experts
    times = {name: size for name, size in root.files().items() if second.id not in name}
    heavier = first.model_copy(update={"mass": 0.25})
    after = publish_one(root, make_draft(tmp_path / "new", 1, 9.0), [third, heavier])
    assert after.manifest.experts[0] == heavier
    assert after.manifest.experts[2] == third
    assert after.manifest.experts[1].version != second.version
    assert after.manifest.version != before.manifest.version
    left = {name: size for name, size in root.files().items() if second.id not in name}
    assert left.keys() == times.keys()
    for entry in (first, third):
        assert after.card(entry) == before.card(entry)


def test_what_is_not_there_is_not_kept(root: Storage, tmp_path: Path) -> None:
    before = publish_values(root, tmp_path / "work", [1.0, 2.0])
    manifest = root.read(MANIFEST_FILE)
    gone = before.manifest.experts[0].model_copy(update={"version": "0" * 12})
    with pytest.raises(BundleError, match=r"does not hold expert-0000@0{12}"):
        publish_one(root, make_draft(tmp_path / "new", 1), [gone])
    with pytest.raises(StaleBundleError, match="experts of another base"):
        publish(
            root,
            base=BASE.model_copy(update={"digest": "b" * 64}),
            router_dir=make_router(tmp_path),
            clusters=2,
            experts=[],
            config_digest="c" * 64,
            keep=before.manifest.experts,
        )
    assert root.read(MANIFEST_FILE) == manifest


def test_publishing_again_mends_a_damaged_bundle_behind_a_url(tmp_path: Path, ftp_url: str) -> None:
    root, work = Storage(ftp_url), tmp_path / "work"
    bundle = publish_values(root, work, [1.0])
    (entry,) = bundle.manifest.experts
    name = f"{entry.directory}/adapter_model.safetensors"
    content = root.read(name)
    root.write(name, bytes(len(content)))
    with pytest.raises(DamagedBundleError, match=r"ftp://introvert:\*\*\*@.*was changed"):
        bundle.expert_dir(entry)
    assert not bundle.place_of(entry).exists(), "nothing damaged is left in the cache"
    bundle = publish_values(root, work, [1.0])
    assert (bundle.expert_dir(entry) / "adapter_model.safetensors").read_bytes() == content


def test_only_what_is_asked_for_is_copied_and_only_once(
    ftp: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    with ftp(shown) as url:
        root = Storage(url) / "bundle"
        bundle = publish_values(root, tmp_path / "work", [1.0, 2.0], tmp_path / "cache")
        assert not bundle.root.exists()
        assert (bundle.router_dir / "router.json").is_file()
        assert not (bundle.root / "experts").exists()
        copy = bundle.expert_dir(bundle.manifest.experts[1])
        assert copy.is_relative_to(tmp_path / "cache")
        inode = copy.stat().st_ino
    again = pickle.loads(pickle.dumps(bundle.expert(bundle.manifest.experts[1])))
    assert again.fetch(copy) == copy, "the server is gone, the copy is not"
    assert copy.stat().st_ino == inode
    with pytest.raises(StorageError, match="refused"):
        bundle.expert_dir(bundle.manifest.experts[0])
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(StorageError, match="refused"):
        bundle.expert_dir(bundle.manifest.experts[1])


def test_processes_that_want_one_copy_share_it(tmp_path: Path, ftp_url: str) -> None:
    bundle = publish_values(Storage(ftp_url), tmp_path / "work", [1.0])
    (entry,) = bundle.manifest.experts
    with ThreadPoolExecutor(6) as pool:
        copies = list(pool.map(lambda _: bundle.expert_dir(entry).stat().st_ino, range(12)))
    assert len(set(copies)) == 1
    assert sorted(path.name for path in bundle.expert_dir(entry).parent.iterdir()) == [
        ".copy.lock",
        entry.version,
    ]


def test_publishing_again_mends_a_damaged_bundle(tmp_path: Path) -> None:
    root, work = tmp_path / "bundle", tmp_path / "work"
    bundle = publish_values(root, work, [1.0])
    weights = bundle.expert_dir(bundle.manifest.experts[0]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedBundleError, match="bytes where"):
        open_bundle(root)
    publish_values(root, work, [1.0])


def test_no_manifest_is_not_published(root: Storage) -> None:
    with pytest.raises(NotPublishedError, match="introvert train"):
        open_bundle(root)


def test_a_held_back_expert_is_listed_and_not_served(tmp_path: Path) -> None:
    drafts = [make_draft(tmp_path, 0), make_draft(tmp_path, 1, state="held_back")]
    manifest = publish(
        tmp_path / "bundle",
        base=BASE,
        router_dir=make_router(tmp_path),
        clusters=2,
        experts=drafts,
        config_digest="c" * 64,
    )
    assert [entry.state for entry in manifest.experts] == ["admitted", "held_back"]
    assert [entry.id for entry in manifest.served] == ["expert-0000"]


@pytest.mark.parametrize("name", ["adapter_model.bin", "extra.pt", "state.pkl"])
def test_other_weight_files_are_refused(tmp_path: Path, name: str) -> None:
    draft = make_draft(tmp_path, 0)
    (draft.directory / name).write_bytes(b"\x80\x04")
    with pytest.raises(BundleError, match=name):
        publish_values_of(tmp_path, draft)


def test_a_pickle_that_calls_itself_safetensors_is_refused(tmp_path: Path) -> None:
    draft = make_draft(tmp_path, 0)
    (draft.directory / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(BundleError, match="not a safetensors"):
        publish_values_of(tmp_path, draft)


def publish_values_of(root: Path, draft: ExpertDraft) -> None:
    publish(
        root / "bundle",
        base=BASE,
        router_dir=make_router(root),
        clusters=1,
        experts=[draft],
        config_digest="c" * 64,
    )


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    bundle = publish_values(tmp_path / "bundle", tmp_path / "work", [1.0])
    stranger = bundle.expert_dir(bundle.manifest.experts[0]) / "notes.txt"
    stranger.write_text("hello")
    with pytest.raises(DamagedBundleError, match=r"notes\.txt is not listed"):
        open_bundle(bundle.root)
    stranger.unlink()
    (bundle.router_dir / "router.json").unlink()
    with pytest.raises(DamagedBundleError, match=r"router\.json is missing"):
        open_bundle(bundle.root)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("published")
    return publish_values(root / "bundle", root / "work", [1.0, 2.0])


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_flipped_byte_in_any_file_is_noticed(published: Bundle, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files_of(published)))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    mask = data.draw(st.integers(1, 255))
    changed = bytearray(content)
    changed[position] ^= mask
    path.write_bytes(bytes(changed))
    try:
        with pytest.raises(DamagedBundleError) as caught:
            open_bundle(published.root)
        assert path.name in str(caught.value)
    finally:
        path.write_bytes(content)
    open_bundle(published.root)


PUBLISHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.expert_trainer import test_bundle as t
root, work = Path(sys.argv[2]), Path(sys.argv[3])
value = 0.0
while True:
    value += 1.0
    t.publish_values(root, work, [value, value, value])
    print(value, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.007, 0.013, 0.021])
def test_a_killed_publisher_leaves_a_whole_bundle(tmp_path: Path, delay: float) -> None:
    root, work = tmp_path / "bundle", tmp_path / "work"
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(Path(__file__).parents[2]), str(root), str(work)],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    bundle = open_bundle(root)
    digests = {
        hashlib.sha256((bundle.expert_dir(e) / "adapter_model.safetensors").read_bytes()).digest()
        for e in bundle.manifest.experts
    }
    assert len(bundle.manifest.experts) == 3
    assert len(digests) == 1, "experts of two publications in one bundle"
    after = publish_values(root, tmp_path / "fresh", [0.5])
    assert len(after.manifest.experts) == 1
    assert not list(root.rglob(".staged-*")), "leftovers are swept away"


def test_readers_see_one_publication_while_two_publish(tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    publish_values(root, tmp_path / "first", [0.0, 0.0])
    stop = threading.Event()

    def keep_publishing(name: str, value: float) -> None:
        while not stop.is_set():
            publish_values(root, tmp_path / name, [value, value])

    threads = [
        threading.Thread(target=keep_publishing, args=("left", 1.0)),
        threading.Thread(target=keep_publishing, args=("right", 2.0)),
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            bundle = open_bundle(root)
            weights = [
                (bundle.expert_dir(entry) / "adapter_model.safetensors").read_bytes()
                for entry in bundle.manifest.experts
            ]
            assert weights[0] == weights[1]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
