"""The bundle, in a directory or behind an fsspec URL: publish one, open one, withdraw from one.

Publishing puts every versioned directory in its place first and replaces `manifest.json` last, so
whoever reads sees a whole bundle or the one before it. Opening verifies the manifest against its
own hash and every file against the manifest; what lies behind a URL is copied to this machine
when it is asked for, and verified then.

Knows nothing of training or serving, and needs neither torch nor Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from configs.manifest import (
    CARD_FILE,
    BaseEntry,
    BundleManifest,
    ExpertCard,
    ExpertEntry,
    FileEntry,
    RouterEntry,
    bundle_version,
    content_version,
)
from configs.schema import BundleConfig
from expert_trainer.errors import (
    BundleError,
    StaleBundleError,
    StorageError,
)
from expert_trainer.hashed import HashedDirectory, damaged
from expert_trainer.manifest_file import read_manifest, write_manifest
from expert_trainer.placing import (
    changing,
    check_safetensors,
    file_entries,
    put_in_place,
    read_files,
    refuse_unsafe,
)
from expert_trainer.storage import Storage, as_storage

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"})
COPIES_DIR = "copies"
AT_ONCE = 8
"""Experts read or written at once behind a URL, where each costs many round trips."""
NAMED_EXPERTS = 12
"""Experts that an error names before it only counts them."""
_LOCK_FILE = ".publish.lock"

Place = str | Path | Storage
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class ExpertDraft:
    """One trained expert on its way into a bundle."""

    directory: Storage | Path
    """Holds the adapter's weights and config."""
    card: ExpertCard
    mass: float
    """The cluster's share of the corpus, by tokens."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its manifest and where its files lie."""

    root: Path
    """The bundle's directory, or the place of its copies on this machine."""
    manifest: BundleManifest
    origin: Storage | None = None
    """Where it was published, if that is behind a URL."""

    @property
    def place(self) -> Storage:
        """Where it was published."""
        return self.origin or Storage(self.root)

    @property
    def router(self) -> HashedDirectory:
        """The saved router as it was published."""
        entry = self.manifest.router
        return HashedDirectory(self.place / "router" / entry.version, tuple(entry.files))

    @property
    def router_dir(self) -> Path:
        """Directory of the saved router on this machine; raises as `HashedDirectory.fetch`."""
        return self.router.fetch(self.root / "router" / self.manifest.router.version)

    def expert(self, entry: ExpertEntry) -> HashedDirectory:
        """An expert's files as they were published."""
        return HashedDirectory(self.place / entry.directory, tuple(entry.files))

    def place_of(self, entry: ExpertEntry) -> Path:
        """Where an expert's directory is on this machine, or is to be."""
        return self.root / entry.directory

    def expert_dir(self, entry: ExpertEntry) -> Path:
        """Directory of an expert's adapter on this machine, as PEFT and vLLM read it.

        Raises as `HashedDirectory.fetch`.
        """
        return self.expert(entry).fetch(self.place_of(entry))

    def card(self, entry: ExpertEntry) -> ExpertCard:
        """The card that was published with this version of the expert.

        Its `state` is what the gate said then; what holds now is the manifest's `entry.state`.

        Raises:
            DamagedBundleError: the card is missing, changed or no card.
        """
        directory = self.expert(entry)
        try:
            return ExpertCard.model_validate_json(directory.read(CARD_FILE))
        except ValidationError:
            raise damaged(f"{directory.place}/{CARD_FILE}", "is not a card") from None

    def cards(self, entries: Sequence[ExpertEntry]) -> list[ExpertCard]:
        """The cards of many experts, in order; raises as `card`."""
        return _each(self.place, self.card, entries)


def code_version() -> str:
    """Version of the installed project."""
    return package_version("introvert")


def utc_now() -> str:
    """The time, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def open_bundle(path: Place, *, verify: bool = True, cache: Path | None = None) -> Bundle:
    """Open a bundle.

    From behind a URL only the manifest is read now. A directory of it is copied when
    `router_dir` or `expert_dir` first asks for it, and verified by its hashes whatever `verify`
    says; a copy that is there already serves again.

    Args:
        path: the bundle's directory or fsspec URL.
        verify: read every file of a local bundle and compare its size and hash.
        cache: local directory for copies; default: one in the user's cache directory.

    Raises:
        NotPublishedError: no manifest is there.
        DamagedBundleError: the first file that is missing, unknown, truncated or changed.
        StorageError: it cannot be reached.
    """
    place = as_storage(path)
    manifest = read_manifest(place)
    if place.path is None:
        name = hashlib.sha256(place.url.encode()).hexdigest()[:16]
        return Bundle((cache or user_cache()) / name, manifest, place)
    bundle = Bundle(place.path, manifest)
    if verify:
        for directory in (bundle.router, *map(bundle.expert, manifest.experts)):
            directory.verify()
    return bundle


def open_published(config: BundleConfig, *, verify: bool = True) -> Bundle:
    """Open a run's bundle, with copies in its scratch directory; otherwise as `open_bundle`."""
    return open_bundle(config.path, verify=verify, cache=config.scratch.absolute() / COPIES_DIR)


def user_cache() -> Path:
    """Where copies of bundles are kept that no config says the place of."""
    return Path.home() / ".cache" / "introvert" / "bundles"


def publish(
    path: Place,
    *,
    base: BaseEntry,
    router_dir: Storage | Path,
    clusters: int,
    experts: Sequence[ExpertDraft],
    config_digest: str,
    keep: Sequence[ExpertEntry] = (),
) -> BundleManifest:
    """Publish a router and its experts as the bundle at `path`; return the manifest written.

    A version that the manifest in place names and that is intact is kept as it is, card included;
    if it was withdrawn, it stays so. Publishers of one local bundle wait for each other; one that
    dies leaves the bundle before it, whole. Behind a URL nothing keeps two publishers apart: the
    bundle is that of the one who ends last.

    Args:
        path: the bundle's directory or URL, made if missing.
        base: the base that the experts belong to.
        router_dir: a saved router; all its files go in.
        clusters: the router's clusters.
        experts: adapters with their cards; held-back ones are listed but not served.
        config_digest: sha256 of the run's config.
        keep: entries of the bundle in place whose directories stay untouched, unread too; an
            entry's mass may be another than it was.

    Raises:
        BundleError: an adapter or router that is incomplete or not stored as safetensors, or an
            expert to keep that is not there.
        StaleBundleError: experts to keep belong to another base.
        StorageError: it cannot be written.
    """
    root = as_storage(path)
    with changing(root):
        before = _manifest_in_place(root)
        kept = _kept(root, before, base, keep)
        known = _known_directories(before)
        router = _publish_router(root, as_storage(router_dir), clusters, known)
        drafted = _each(root, lambda draft: _publish_expert(root, draft, known), experts)
        entries = sorted([*kept, *_still_withdrawn(drafted, before)], key=lambda entry: entry.id)
        assert len({entry.id for entry in entries}) == len(entries), "kept or replaced, not both"
        manifest = BundleManifest(
            version=bundle_version(base, router, entries),
            created=utc_now(),
            code_version=code_version(),
            config_digest=config_digest,
            base=base,
            router=router,
            experts=entries,
        )
        return write_manifest(root, manifest)


def router_version(directory: Storage | Path) -> str:
    """The version under which a saved router is, or would be, published."""
    return content_version(file_entries(read_files(as_storage(directory))))


def _each(place: Storage, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Do the same for each of many, in order; several at once where the waiting is long."""
    if place.path is not None:
        return [work(item) for item in items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, items))


def _manifest_in_place(root: Storage) -> BundleManifest | None:
    """The manifest to be replaced; none if there is none that can be believed."""
    with suppress(BundleError):
        return read_manifest(root)
    return None


def _known_directories(before: BundleManifest | None) -> dict[str, tuple[FileEntry, ...]]:
    """The versioned directories that the manifest in place names, with their files."""
    if before is None:
        return {}
    known = {entry.directory: tuple(entry.files) for entry in before.experts}
    known[f"router/{before.router.version}"] = tuple(before.router.files)
    return known


def _kept(
    root: Storage, before: BundleManifest | None, base: BaseEntry, keep: Sequence[ExpertEntry]
) -> list[ExpertEntry]:
    if keep and before is not None and before.base.digest != base.digest:
        raise StaleBundleError(
            f"{root} holds experts of another base ({before.base.model}); train all of them again"
        )
    there = {entry.served_name: entry for entry in before.experts} if before else {}
    for entry in keep:
        if entry.served_name not in there or there[entry.served_name].files != entry.files:
            raise BundleError(
                f"{root} does not hold {entry.served_name} any more; run `introvert train` again"
            )
    return [entry.model_copy(update={"state": there[entry.served_name].state}) for entry in keep]


def _still_withdrawn(
    entries: Iterable[ExpertEntry], before: BundleManifest | None
) -> list[ExpertEntry]:
    withdrawn = {
        entry.served_name
        for entry in (before.experts if before else ())
        if entry.state == "withdrawn"
    }
    return [
        entry.model_copy(update={"state": "withdrawn"}) if entry.served_name in withdrawn else entry
        for entry in entries
    ]


def _publish_router(
    root: Storage, source: Storage, clusters: int, known: Mapping[str, tuple[FileEntry, ...]]
) -> RouterEntry:
    files = read_files(source)
    if not files:
        raise BundleError(f"{source} holds no router; run `introvert fit` first")
    refuse_unsafe(source, files)
    version = content_version(file_entries(files))
    placed = put_in_place(root, f"router/{version}", files, known)
    return RouterEntry(version=version, clusters=clusters, files=list(placed))


def _publish_expert(
    root: Storage, draft: ExpertDraft, known: Mapping[str, tuple[FileEntry, ...]]
) -> ExpertEntry:
    source, card = as_storage(draft.directory), draft.card
    refuse_unsafe(source, source.names())
    files = {}
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        try:
            files[name] = source.read(name)
        except (FileNotFoundError, StorageError):
            raise BundleError(
                f"{source} has no readable {name}; remove the directory and train again"
            ) from None
    check_safetensors(f"{source}/{ADAPTER_WEIGHTS}", files[ADAPTER_WEIGHTS])
    version = content_version(file_entries(files))
    files[CARD_FILE] = (card.model_dump_json(indent=2) + "\n").encode()
    return ExpertEntry(
        id=card.id,
        version=version,
        cluster=card.cluster,
        state=card.state,
        rank=card.rank,
        mass=draft.mass,
        files=list(put_in_place(root, f"experts/{card.id}/{version}", files, known)),
    )
