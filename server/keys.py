"""The file of API keys: what it says, checked as a whole, and changed whole.

A key is 256 random bits, shown once; the file has its SHA-256 alone. A fast hash is the right one
here: what makes passwords need a slow one, that they can be guessed, a random key does not have.

Knows nothing of requests.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from server.errors import KeysError

KEY_PREFIX = "ivk_"
"""So that a key that has leaked somewhere is recognised for what it is."""

HEADER = "# API keys: of each the SHA-256 alone. `introvert keys` makes, lists and revokes them.\n"


class KeyEntry(BaseModel):
    """One API key."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    """Whose key it is, in logs and metrics; letters, digits, `.`, `_` and `-`."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key, in hexadecimal digits."""
    weight: Annotated[PositiveFloat, AllowInfNan(False)] = 1.0
    """Share of a busy worker, relative to the others'."""
    requests_per_minute: Annotated[float, Field(ge=0.001, allow_inf_nan=False)] | None = None
    """How often it may ask: evenly, or a minute's worth at once; none: no limit."""
    concurrent: PositiveInt | None = None
    """Requests that it may have running; none: no limit."""
    experts: list[str] | None = None
    """Ids of the experts, and `base`, that it may ask; none: all."""


def new_key() -> str:
    """A new key: 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str | bytes) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def read_keys(path: Path) -> list[KeyEntry]:
    """The entries of a file.

    Raises:
        KeysError: it cannot be read, or says something wrong; all mistakes at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise KeysError(f"the keys' file {path} cannot be read: {reason}") from None
    return parse_keys(text, str(path))


def parse_keys(text: str, place: str) -> list[KeyEntry]:
    """The entries of a file's text; `place` names it in errors.

    Raises:
        KeysError: as `read_keys`.
    """
    try:
        document = yaml.safe_load(text)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, say
        raise KeysError(f"{place} is no YAML: {error}") from None
    if document is None:
        return []
    if not isinstance(document, list):
        raise KeysError(f"{place}: a list of keys is expected; `introvert keys new` makes one")
    assert tree is not None
    lines = [node.start_mark.line + 1 for node in tree.value]
    entries, mistakes = [], []
    for line, fields in zip(lines, document, strict=True):
        try:
            entries.append(KeyEntry.model_validate(fields))
        except ValidationError as error:
            mistakes += _mistakes(line, fields, error)
    mistakes += _repeated(entries)
    if mistakes:
        raise KeysError("\n".join([f"{place} cannot be used:", *mistakes]))
    return entries


def add_key(path: Path, entry: KeyEntry) -> None:
    """Append an entry; the file is replaced as a whole, what stood in it stays as it was.

    Raises:
        KeysError: the file cannot be used or written, or has a key of that name.
    """
    with _changing(path):
        before = path.read_text(encoding="utf-8") if path.exists() else HEADER
        if any(known.name == entry.name for known in parse_keys(before, str(path))):
            raise KeysError(
                f"{path} has a key named '{entry.name}' already; revoke it first, or choose "
                "another name"
            )
        fields = entry.model_dump(exclude_defaults=True)
        item = yaml.safe_dump([fields], sort_keys=False, allow_unicode=True)
        gap = "" if not before or before.endswith("\n") else "\n"
        _replace(path, before + gap + item)


def remove_key(path: Path, name: str) -> None:
    """Take an entry out; comments of the file that follow it until the next one go with it.

    Raises:
        KeysError: the file cannot be used or written, or has no key of that name.
    """
    with _changing(path):
        names = [entry.name for entry in read_keys(path)]
        if name not in names:
            known = ", ".join(names) or "none"
            raise KeysError(f"{path} has no key named '{name}'; it has: {known}")
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        assert tree is not None
        starts = [node.start_mark.line for node in tree.value]
        starts.append(len(lines))
        number = names.index(name)
        del lines[starts[number] : starts[number + 1]]
        left = "".join(lines)
        # in the flow style entries share lines: then what is left is written anew
        try:
            same = [entry.name for entry in parse_keys(left, "")] == [n for n in names if n != name]
        except KeysError:
            same = False
        if not same:
            kept = [e.model_dump(exclude_defaults=True) for e in read_keys(path) if e.name != name]
            left = HEADER + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        _replace(path, left)


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """One writer after the other."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise KeysError(f"the keys' file {path} cannot be written: {error.strerror}") from None


def _replace(path: Path, text: str) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _mistakes(line: int, fields: Any, error: ValidationError) -> list[str]:
    name = fields.get("name") if isinstance(fields, dict) else None
    whose = f" ({name})" if isinstance(name, str) else ""
    return [
        f"  line {line}{whose}: {'.'.join(map(str, fault['loc'])) or 'entry'}: {fault['msg']}"
        for fault in error.errors()
    ]


def _repeated(entries: Sequence[KeyEntry]) -> list[str]:
    names: set[str] = set()
    holders: dict[str, str] = {}
    mistakes = []
    for entry in entries:
        if entry.name in names:
            mistakes.append(f"  {entry.name}: there are two keys of this name")
        names.add(entry.name)
        holder = holders.setdefault(entry.sha256, entry.name)
        if holder != entry.name:
            mistakes.append(f"  {entry.name}: it is the key of {holder} as well")
    return mistakes
