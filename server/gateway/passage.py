"""One request on its way through the gateway: what is known of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.gateway.client import Lifeline
from server.gateway.observation import Observation
from server.gateway.protocol import Call, Endpoint, Head
from server.gateway.tenants import ANYBODY, Tenant
from server.gateway.views import Home, Target, View


@dataclass(slots=True)
class Passage:
    """What the parts of the data path hand on to each other; told in the order in which it is
    found out."""

    endpoint: Endpoint
    observation: Observation = field(default_factory=Observation)
    head: Head | None = None
    tenant: Tenant = ANYBODY
    call: Call | None = None
    lifeline: Lifeline | None = None
    key: int = 0
    """Of its conversation; see `server.gateway.choice.conversation_key`."""
    view: View | None = None
    threshold: float | None = None
    """Score below which its bundle's router abstains; none: it was not routed."""
    target: Target | None = None
    home: Home | None = None
    patient_until: float | None = None
    """Until when it may wait for a worker; none before it has begun to wait."""
    survived: bool = False
    """Whether an engine that had it has died: it may have been the reason, and is not carried to a
    third one."""

    @property
    def wanted(self) -> str | None:
        """Id of the expert that was asked for, wherever the request went; none for the base."""
        route = self.observation.route
        if route is not None:
            return route.expert
        return self.target.expert if self.target is not None else None
