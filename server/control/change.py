"""What is known of one change of bundles: its state, and how far the workers are with it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from server.table import RoutingTable

ChangeState = Literal["loading", "canary", "switching", "draining", "done", "refused", "aborted"]
OVER: frozenset[ChangeState] = frozenset({"done", "refused", "aborted"})
LATE: frozenset[ChangeState] = frozenset({"switching", "draining"})
"""States in which it is too late to abort: some requests are on the new bundle alone."""


class Change(BaseModel):
    """One change, as it is told over HTTP."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    bundle: str = ""
    """Version of the bundle to come; empty until its manifest has been read."""
    place: str
    """Its directory or URL, without a password."""
    state: ChangeState = "loading"
    share: float = 0.0
    """Of the conversations, as long as it is a canary."""
    verified: int = 0
    """Experts that answer as their fingerprints say on every ready home."""
    total: int = 0
    refused: dict[str, str] = {}
    """Served names of experts that a worker refused, and why."""
    detail: str = ""
    """What it waits for, or why it came to nothing."""
    took_s: float = 0.0


@dataclass(frozen=True)
class Progress:
    """How far the workers are with a bundle that is to be served next."""

    verified: int
    total: int
    refused: Mapping[str, str]

    @property
    def settled(self) -> bool:
        """Whether every expert is verified or refused."""
        return self.verified + len(self.refused) == self.total


def progress(table: RoutingTable, bundle: str) -> Progress | None:
    """How far the workers are; none while the table does not tell of that bundle.

    A home that is not ready is not waited for: it verifies what it is to hold when it comes back.
    """
    if table.canary is None or table.canary.bundle != bundle:
        return None
    ready = {worker.id: worker for worker in table.workers if worker.state == "ready"}
    verified, refused = 0, {}
    for expert in table.canary.experts:
        name = expert.served_name
        homes = [ready[home] for home in expert.workers if home in ready]
        reasons = [home.refused[name] for home in homes if name in home.refused]
        if reasons:
            refused[name] = reasons[0]
        elif homes and all(name in home.experts for home in homes):
            verified += 1
    return Progress(verified, len(table.canary.experts), refused)


def holders(table: RoutingTable, names: set[str]) -> list[str]:
    """Workers that hold, or have on record, any of these served names."""
    return [w.id for w in table.workers if not names.isdisjoint([*w.experts, *w.refused])]
