"""What the control process tells the controller: what to serve, on whom, by which rules.

Knows nothing of how it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from server.engine import Adapter
from server.placement import Policy

if TYPE_CHECKING:  # it imports Ray, and the driver does not
    from server.worker import WorkerStatus


@dataclass(frozen=True)
class ServedExpert:
    """An expert of a bundle that is to be served."""

    id: str
    version: str
    cluster: int
    mass: float
    adapter: Adapter

    @property
    def name(self) -> str:
        """Its served name."""
        return self.adapter.served_name


@dataclass(frozen=True)
class Deployment:
    """A bundle that is to be served."""

    bundle: str
    """Its version."""
    base_name: str
    experts: tuple[ServedExpert, ...]
    place: str = ""
    """Its directory or URL; empty: as configured."""


@dataclass(frozen=True)
class Orders:
    """Which bundles workers hold, and which of them the table says is served."""

    served: Deployment
    following: Deployment | None = None
    """Held beside the served one, to take its place."""
    share: float = 0.0
    """Share of the conversations that the following one answers."""
    retiring: Deployment | None = None
    """Was served before, and is held until its last request has ended."""

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """All that workers hold, the served one first."""
        others = (self.following, self.retiring)
        return (self.served, *(other for other in others if other is not None))


@dataclass(frozen=True)
class Rules:
    """How the controller goes about it; from `configs.schema.ServingConfig`."""

    slots: int | None
    """LoRA places per worker; none: as many as it is given experts."""
    silence_s: float
    """Seconds without an answer after which a worker counts as down though it may be alive."""
    move_after_s: float
    """Seconds that a worker is not ready before its experts get a shelter."""
    settle_s: float
    """Seconds that a home holds an expert before the one that it left lets go."""
    drain_s: float
    """Seconds that an expert stays loaded where it is not to be asked for any longer."""
    policy: Policy
    """How demands become homes."""


class WorkerPort(Protocol):
    """A worker as the controller needs it."""

    async def status(self) -> WorkerStatus:
        """How it is; `WorkerLostError` if its process is gone."""
        ...

    async def serve(self, adapters: Sequence[Adapter]) -> None:
        """Tell it what to serve; `WorkerLostError` if its process is gone."""
        ...


@dataclass(frozen=True)
class Post:
    """A worker and where it is."""

    name: str
    """Of the actor; a worker that is made anew has another."""
    worker: WorkerPort = field(compare=False)
    node: str
    """Address of its node."""
    adopted: bool = field(default=False, compare=False)
    """The last table is of this very actor, and holds until the actor says otherwise."""
