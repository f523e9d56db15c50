"""`introvert keys`: make, list and revoke API keys."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import ValidationError

from configs.errors import IntrovertError
from deploy.output import check_report, note, say, table, write_report
from server.keys import KeyEntry, add_key, digest_of, new_key, read_keys, remove_key


class KeyOptionError(IntrovertError):
    """What a key is to be cannot be."""

    exit_code = 2


def run(options: argparse.Namespace) -> int:
    """Do one of the actions."""
    path = Path(options.file)
    if options.action == "new":
        return _new(path, options)
    if options.action == "list":
        return _list(path, options.report)
    remove_key(path, options.name)
    say(f"{options.name}: revoked")
    return 0


def _new(path: Path, options: argparse.Namespace) -> int:
    key = new_key()
    try:
        entry = KeyEntry(
            name=options.name,
            sha256=digest_of(key).hex(),
            weight=options.weight,
            requests_per_minute=options.requests_per_minute,
            concurrent=options.concurrent,
            experts=options.experts,
        )
    except ValidationError as error:
        mistakes = [f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors()]
        raise KeyOptionError("no key was made: " + "; ".join(mistakes)) from None
    add_key(path, entry)
    note(f"{path} has the key's hash; the key itself is shown here and nowhere else:")
    say(key)
    return 0


def _list(path: Path, report: str | None) -> int:
    check_report(report)
    entries = read_keys(path)
    write_report(report, {"keys": [entry.model_dump() for entry in entries]})
    rows = [
        [
            entry.name,
            entry.sha256[:12],
            entry.requests_per_minute,
            entry.concurrent,
            entry.weight,
            "all" if entry.experts is None else ", ".join(entry.experts) or "none",
        ]
        for entry in entries
    ]
    say(table(["name", "sha256", "a minute", "at once", "weight", "experts"], rows))
    return 0
