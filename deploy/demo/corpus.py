"""A corpus from the documentation strings of the packages that this project itself installs.

Sources are parsed, never imported. Knows nothing of models.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from configs.errors import IntrovertError

# Packages on clearly different topics, each a runtime dependency of ours or of one of ours.
PACKAGES = (
    "sympy",  # symbolic mathematics
    "networkx",  # graphs
    "pandas",  # tables
    "scipy",  # numerics and statistics
    "sklearn",  # machine learning
    "ray",  # clusters
    "openai",  # a web API
    "huggingface_hub",  # model hub
    "PIL",  # images
)
SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "thirdparty", "externals"}
SHORTEST, LONGEST = 200, 4000
CHARACTERS_PER_PACKAGE = 450_000
SPLITS = (("test", 0.04), ("valid", 0.05))


class CorpusError(IntrovertError):
    """No documentation could be read."""


@dataclass(frozen=True)
class CorpusSummary:
    """What was written."""

    documents: int
    characters: int
    packages: dict[str, int]
    """Documents from each package."""


def build_corpus(
    directory: Path, *, seed: int, packages: Sequence[str] = PACKAGES
) -> CorpusSummary:
    """Write `train.jsonl`, `valid.jsonl` and `test.jsonl`, rows of `id` and `text`.

    The directory appears by rename. Deterministic for a seed and the installed versions.

    Raises:
        CorpusError: none of the packages is installed.
    """
    with ProcessPoolExecutor(max_workers=min(len(packages), os.cpu_count() or 1)) as pool:
        found = dict(zip(packages, pool.map(_read_package, packages), strict=True))
    documents = {name: _sample(name, rows, seed) for name, rows in found.items() if rows}
    if not documents:
        raise CorpusError(
            f"none of {', '.join(packages)} has sources here; install the project with its "
            "cpu or gpu extra"
        )
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _write_splits(staging, [row for rows in documents.values() for row in rows], seed)
    shutil.rmtree(directory, ignore_errors=True)
    staging.rename(directory)
    return CorpusSummary(
        documents=sum(len(rows) for rows in documents.values()),
        characters=sum(len(text) for rows in documents.values() for _, text in rows),
        packages={name: len(rows) for name, rows in documents.items()},
    )


def _read_package(name: str) -> list[tuple[str, str]]:
    """(dotted name, text) of every documentation string of a package, in the order of its files."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations)))
    rows: list[tuple[str, str]] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root.parent).with_suffix("")
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            rows.extend(_read_module(path, ".".join(relative.parts)))
    return rows


def _read_module(path: Path, dotted: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates that only look like Python
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            text = re.sub(r"\n{3,}", "\n\n", ast.get_docstring(node) or "").strip()
            if len(text) >= SHORTEST:
                yield f"{dotted}:{getattr(node, 'name', '')}", text[:LONGEST]


def _sample(name: str, rows: list[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    """A seeded sample without repeats, up to the package's share of characters."""
    unique = list({text: (key, text) for key, text in reversed(rows)}.values())
    random.Random(f"{seed}:{name}").shuffle(unique)
    taken, characters = [], 0
    for key, text in unique:
        if characters >= CHARACTERS_PER_PACKAGE:
            break
        taken.append((key, text))
        characters += len(text)
    return taken


def _write_splits(directory: Path, rows: list[tuple[str, str]], seed: int) -> None:
    """Documents go to a split by a hash of their text, so that none is ever in two."""
    lines: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for key, text in rows:
        digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
        position, split = int.from_bytes(digest[:8]) / 2**64, "train"
        for name, share in SPLITS:
            if position < share:
                split = name
                break
            position -= share
        lines[split].append(json.dumps({"id": key, "text": text}, ensure_ascii=False))
    for split, content in lines.items():
        (directory / f"{split}.jsonl").write_text("\n".join(content) + "\n", encoding="utf-8")
