"""Schemas of what `/admin/*` is asked and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from server.gateway.answers import Answer, ReadyAnswer, RouterStatus
from server.table import RoutingTable


class ProcessAnswer(Answer):
    """One gateway process."""

    process: int
    """Its number."""
    pid: int
    started: str
    """UTC, ISO 8601."""
    table_version: int
    """Of the routing table that it uses; 0 before the first."""
    in_flight: int
    """Requests that it has running."""


class StatusAnswer(Answer):
    """Everything that the gateway processes know."""

    version: str
    """Version of the gateway's code."""
    pid: int
    """Of the process that answers."""
    started: str
    """When it was started: UTC, ISO 8601."""
    ready: ReadyAnswer
    router: RouterStatus
    in_flight: dict[str, int]
    """Requests in flight, by worker, over all processes."""
    queued: dict[str, int]
    """Requests that wait in the gateway, by worker, over all processes."""
    requests: dict[str, int]
    """Requests answered, by expert, over all processes; those never asked are missing."""
    cold_loads: dict[str, int]
    """Requests whose expert was in no slot of the worker, by expert."""
    processes: list[ProcessAnswer]
    """The processes that answer."""
    processes_expected: int
    """How many there should be."""
    change: dict[str, Any] | None
    """The change of the bundle that is under way or was the last, as `GET /admin/bundle` has it."""
    table: RoutingTable | None
    """The routing table in use; none before the first."""


class BundleRequest(Answer):
    """Which bundle to serve next."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    """Its directory or URL: the configured one, which may have been published again, or one that
    lies beside it."""
    canary: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the conversations that it answers until it is promoted; null: it takes the old
    one's place as soon as it is ready."""


class ServedBundle(Answer):
    """The bundle that is served."""

    model_config = ConfigDict(extra="allow")

    bundle: str
    """Its version."""
    place: str
    """Its directory or URL."""


class BundleChange(Answer):
    """The change to another bundle."""

    model_config = ConfigDict(extra="allow")

    bundle: str
    """Version of the new bundle."""
    place: str
    state: Literal["loading", "canary", "switching", "draining", "done", "refused", "aborted"]
    share: float | None = None
    """Share of the conversations that it answers."""
    verified: int
    """Experts that workers have loaded and verified."""
    total: int
    refused: dict[str, str] = Field(default_factory=dict)
    """Served names of experts that workers refused, each with the reason."""
    detail: str = ""
    took_s: float | None = None


class BundleAnswer(Answer):
    """What is served, and what is to be."""

    current: ServedBundle
    change: BundleChange | None
