"""The one file of a bundle that changes: read and checked, sealed and replaced.

Its digest is a hash over all its other fields, so that a changed manifest tells. Knows nothing of
the directories that it names.
"""

from __future__ import annotations

import hashlib

from pydantic import ValidationError

from configs.manifest import FORMAT, MANIFEST_FILE, BundleManifest
from expert_trainer.errors import NotPublishedError
from expert_trainer.hashed import damaged
from expert_trainer.storage import Storage


def read_manifest(root: Storage) -> BundleManifest:
    """The manifest of the bundle in a directory.

    Raises:
        NotPublishedError: there is none.
        DamagedBundleError: it is not what was published.
        StorageError: it cannot be told.
    """
    path = f"{root}/{MANIFEST_FILE}"
    try:
        content = root.read(MANIFEST_FILE)
    except FileNotFoundError:
        raise NotPublishedError(
            f"{root} is not published: it has no {MANIFEST_FILE}; run `introvert train` first"
        ) from None
    try:
        manifest = BundleManifest.model_validate_json(content)
    except ValidationError:
        raise damaged(path, f"is not a manifest of format {FORMAT}") from None
    if content != _canonical(manifest) or manifest.digest != _seal(manifest):
        raise damaged(path, "was changed after it had been published")
    return manifest


def write_manifest(root: Storage, manifest: BundleManifest) -> BundleManifest:
    """Seal a manifest and put it in its place: the moment of publication.

    Returns:
        The manifest with its digest, as it was written.

    Raises:
        StorageError: it cannot be written; the one before it stands.
    """
    sealed = manifest.model_copy(update={"digest": _seal(manifest)})
    root.write(MANIFEST_FILE, _canonical(sealed))
    return sealed


def _canonical(manifest: BundleManifest) -> bytes:
    return (manifest.model_dump_json(indent=1) + "\n").encode()


def _seal(manifest: BundleManifest) -> str:
    return hashlib.sha256(_canonical(manifest.model_copy(update={"digest": None}))).hexdigest()
