"""Stages that a second run finds finished: a result with the key of what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.output import note


def digest(*parts: object) -> str:
    """Key of a stage: a hash over everything its result depends on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Stages:
    """Runs stages in turn, times them and remembers their results in `directory`."""

    directory: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage of this run, reused or not."""
    reused: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a stage that decides by itself what to reuse."""
        note(f"▸ {name}")
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - started, 2)

    def once(
        self, name: str, key: str, outputs: list[Path], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The result of `make`, made anew unless the key stands and every output is there."""
        stamp = self.directory / f"{name}.stage.json"
        with self.timed(name):
            stored = _read(stamp)
            if stored.get("key") == key and all(path.exists() for path in outputs):
                self.reused.append(name)
                note("  reused")
            else:
                stored = {"key": key, "result": make()}
                stamp.parent.mkdir(parents=True, exist_ok=True)
                temporary = stamp.with_name(f".{stamp.name}.{os.getpid()}")
                temporary.write_text(json.dumps(stored))
                temporary.replace(stamp)
        result: dict[str, Any] = stored["result"]
        return result


def _read(stamp: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads(stamp.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return stored
