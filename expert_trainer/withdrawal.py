"""Experts taken out of serving and given back to it, in a published bundle.

Only the manifest changes. Knows nothing of how serving goes by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from configs.manifest import BundleManifest, ExpertEntry, ExpertState, bundle_version
from expert_trainer.bundle import Bundle, Place, open_bundle
from expert_trainer.errors import UnknownExpertError
from expert_trainer.manifest_file import read_manifest, write_manifest
from expert_trainer.placing import changing
from expert_trainer.storage import as_storage

NAMED_EXPERTS = 12
"""Experts that an error names before it only counts them."""


def withdraw(path: Place, experts: Sequence[str]) -> BundleManifest:
    """Take experts out of serving; return the manifest that says so.

    Nothing else changes; their clusters go to the base from then on. Withdrawing again does
    nothing. It holds for this version of an expert: one trained anew is judged anew.

    Raises:
        UnknownExpertError: there is no such expert.
        BundleError: there is no sound bundle.
        StorageError: it cannot be written.
    """
    return _change_states(path, experts, lambda *_: "withdrawn")


def restore(path: Place, experts: Sequence[str]) -> BundleManifest:
    """Give withdrawn experts the state back that the gate gave them; raises as `withdraw`."""

    def state_of(bundle: Bundle, entry: ExpertEntry) -> ExpertState:
        return bundle.card(entry).state if entry.state == "withdrawn" else entry.state

    return _change_states(path, experts, state_of)


def find_experts(bundle: Bundle, experts: Iterable[str]) -> list[ExpertEntry]:
    """Entries by their ids, in that order.

    Raises:
        UnknownExpertError: names those that are not there and those that are.
    """
    entries = {entry.id: entry for entry in bundle.manifest.experts}
    wanted = list(experts)
    if unknown := [name for name in wanted if name not in entries]:
        there = ", ".join(sorted(entries)[:NAMED_EXPERTS]) or "none"
        more = f" and {len(entries) - NAMED_EXPERTS:,} more" if len(entries) > NAMED_EXPERTS else ""
        raise UnknownExpertError(
            f"{bundle.place} has no {', '.join(unknown)}; name one of its experts: {there}{more}"
        )
    return [entries[name] for name in wanted]


def _change_states(
    path: Place, experts: Sequence[str], state_of: Callable[[Bundle, ExpertEntry], ExpertState]
) -> BundleManifest:
    root = as_storage(path)
    read_manifest(root)  # before a lock is made where no bundle is
    with changing(root):
        bundle = open_bundle(root, verify=False)
        manifest = bundle.manifest
        states = {entry.id: state_of(bundle, entry) for entry in find_experts(bundle, experts)}
        entries = [
            entry.model_copy(update={"state": states.get(entry.id, entry.state)})
            for entry in manifest.experts
        ]
        if entries == manifest.experts:
            return manifest
        version = bundle_version(manifest.base, manifest.router, entries)
        changed = manifest.model_copy(update={"experts": entries, "version": version})
        return write_manifest(root, changed)
