"""`introvert experts`: what a bundle holds, and which of it is served."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs import ConfigError, load_config
from configs.manifest import BundleManifest, ExpertCard, ExpertEntry, LossPoint
from deploy.output import check_report, note, say, table, write_report
from expert_trainer.bundle import Bundle, open_bundle, open_published
from expert_trainer.storage import is_url
from expert_trainer.withdrawal import find_experts, restore, withdraw

TERMS = 5
SHOWN_ITEMS = 8
"""Of a long list in a card, this many are shown."""
TO_BE_RESTARTED = "an endpoint that serves it goes on until it is restarted"


def run(options: argparse.Namespace) -> int:
    """List, show, withdraw or restore; 2 for an expert that is not there."""
    check_report(options.report)
    bundle = find_bundle(options.bundle, options.overrides)
    if options.action in ("list", "show"):
        _tell(bundle, options)
    else:
        _change(bundle, options)
    return 0


def find_bundle(name: str, overrides: Sequence[str]) -> Bundle:
    """The bundle that a config, a preset, a directory or a URL names.

    Raises:
        ConfigError: overrides for what is no config, or a config that cannot be used.
        BundleError: there is no sound bundle.
        StorageError: it cannot be reached.
    """
    if not is_url(name) and not Path(name).is_dir():
        return open_published(load_config(name, overrides).bundle, verify=False)
    if overrides:
        raise ConfigError("introvert experts", [f"--set {overrides[0]}: {name} is no config"])
    return open_bundle(name, verify=False)


def summarise(entries: Sequence[ExpertEntry], cards: Sequence[ExpertCard]) -> str:
    """A table of experts: what they learnt from, and what that is worth on held-out text."""
    headers = ["expert", "version", "state", "tokens", "base loss", "expert loss", "gain"]
    rows = [
        [
            entry.id,
            entry.version,
            entry.state.replace("_", " "),
            card.tokens,
            _loss(card.heldout_loss_base),
            _loss(card.heldout_loss_expert),
            _loss(_gain(card)),
            " ".join(card.top_terms[:TERMS]),
        ]
        for entry, card in zip(entries, cards, strict=True)
    ]
    return table([*headers, "top terms"], rows)


def describe(entry: ExpertEntry, card: ExpertCard) -> str:
    """A card as text: every field a line, long ones shortened."""
    facts = {"state": entry.state, "mass": entry.mass, "gain": _gain(card)}
    shown = [name for name in type(card).model_fields if name not in {"id", "state"}]
    facts |= {name: getattr(card, name) for name in shown}
    width = max(map(len, facts))
    lines = [f"  {name.replace('_', ' '):<{width}}  {_shown(facts[name])}" for name in facts]
    return "\n".join([entry.served_name, *lines])


def _tell(bundle: Bundle, options: argparse.Namespace) -> None:
    entries = find_experts(bundle, options.ids) if options.ids else bundle.manifest.experts
    cards = bundle.cards(entries)
    if options.action == "list":
        say(summarise(entries, cards))
        say(f"\n{_count(bundle.manifest)}: bundle {bundle.manifest.version} in {bundle.place}")
    else:
        say("\n\n".join(map(describe, entries, cards)))
    _report(options, bundle, bundle.manifest, entries, cards)


def _change(bundle: Bundle, options: argparse.Namespace) -> None:
    change = withdraw if options.action == "withdraw" else restore
    before = {entry.id: entry.state for entry in bundle.manifest.experts}
    manifest = change(bundle.place, options.ids)
    entries = [entry for entry in manifest.experts if entry.id in set(options.ids)]
    for entry in entries:
        state = entry.state.replace("_", " ")
        say(f"{entry.id} {'was' if before[entry.id] == entry.state else 'is now'} {state}")
    if manifest.version != bundle.manifest.version:
        note(f"bundle {manifest.version} in place of {bundle.manifest.version}; {TO_BE_RESTARTED}")
    _report(options, bundle, manifest, entries, bundle.cards(entries))


def _report(
    options: argparse.Namespace,
    bundle: Bundle,
    manifest: BundleManifest,
    entries: Sequence[ExpertEntry],
    cards: Sequence[ExpertCard],
) -> None:
    experts = [
        {**entry.model_dump(mode="json"), "gain": _gain(card), "card": card.model_dump(mode="json")}
        for entry, card in zip(entries, cards, strict=True)
    ]
    content = {"bundle": str(bundle.place), "version": manifest.version, "experts": experts}
    write_report(options.report, content)


def _count(manifest: BundleManifest) -> str:
    states = [entry.state for entry in manifest.experts]
    kinds = [f"{states.count(state):,} {state.replace('_', ' ')}" for state in sorted(set(states))]
    return f"{len(states):,} experts ({', '.join(kinds)})" if states else "no experts"


def _gain(card: ExpertCard) -> float | None:
    """Nats per token that the expert saves on its cluster's held-out text."""
    if card.heldout_loss_base is None or card.heldout_loss_expert is None:
        return None
    return card.heldout_loss_base - card.heldout_loss_expert


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _shown(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return "–"
    if isinstance(value, list) and value and isinstance(value[0], LossPoint):
        return _curve(value)
    if isinstance(value, list):
        more = f" … ({len(value):,})" if len(value) > SHOWN_ITEMS else ""
        return ", ".join(map(_shown, value[:SHOWN_ITEMS])) + more
    if isinstance(value, float):
        return f"{value:.6g}"
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return "; ".join(f"{name} {_shown(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _curve(points: Sequence[LossPoint]) -> str:
    """A few points of a loss curve, its first and its last among them."""
    last, parts = len(points) - 1, SHOWN_ITEMS - 1
    chosen = sorted({round(part * last / parts) for part in range(SHOWN_ITEMS)})
    return ", ".join(f"{points[i].loss:.4f} after {points[i].step}" for i in chosen)
