"""What became of one request: filled in on its way, told once at its end.

Metrics, logs and traces are made from it; it knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from multidict import CIMultiDict

from router.types import Route

Spill = Literal["", "runner-up", "base"]
"""Where a routed request went instead of its expert, if the wait for that one was too long."""


@dataclass(slots=True)
class Observation:
    """One request; times are seconds, moments are seconds on the performance counter."""

    endpoint: str = ""
    request_id: str = ""
    tenant: str = ""
    """Name of the API key; empty where none are asked for."""
    bundle: str = ""
    """Version of the bundle that its expert is of."""
    expert: str = ""
    """The expert's id, or `base`; empty before it is known."""
    expert_version: str = ""
    worker: str = ""
    route: Route | None = None
    routed_by: str = ""
    """What decided the route: `student` or `embedder`; empty where nothing was routed."""
    spill: Spill = ""
    cold: bool = False
    """Whether its expert was in no slot of the worker, as far as the gateway can tell."""
    streamed: bool = False
    status: int = 0
    """Status sent to the client; 0 before any was, 499 where the client hung up."""
    error: str = ""
    """`code` of the error answer, if it was one."""
    began: float = 0.0
    """When the whole body had come."""
    route_s: float = 0.0
    queue_s: float = 0.0
    """Waiting in the gateway for the worker."""
    engine_s: float = 0.0
    """Waiting for the engine up to its first byte, workers that could not be reached included."""
    overhead_s: float | None = None
    """The gateway's own time up to the first byte sent; none if none was sent."""
    ended: float = 0.0
    retries: int = 0
    prompt_tokens: int | None = None
    """As the engine's answer says; none where it does not."""
    output_tokens: int | None = None
    trace_headers: CIMultiDict[str] = field(default_factory=CIMultiDict)
    """The caller's `traceparent` and `tracestate`; for the engine once `began` has been told."""
    trace: Any = None
    """Whatever a recorder keeps of it between its beginning and its end."""


class Recorder(Protocol):
    """Whatever wants to know of requests."""

    def began(self, observation: Observation) -> None:
        """A request's headers and body have come; may set `trace_headers` for the engine."""
        ...

    def ended(self, observation: Observation) -> None:
        """The request is over, one way or another. Must not fail and must be quick."""
        ...
