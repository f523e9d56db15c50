"""Who is told of every request: metrics always, the access log and traces where configured."""

from __future__ import annotations

from collections.abc import Sequence

from server.gateway.metrics import Metrics
from server.gateway.observation import Observation, Recorder


class RequestRecorder:
    """Tells the metrics and whoever else listens; see `server.gateway.observation.Recorder`."""

    def __init__(self, metrics: Metrics, others: Sequence[Recorder] = ()) -> None:
        self._metrics = metrics
        self._others = tuple(others)

    def began(self, observation: Observation) -> None:
        """A request has come."""
        for other in self._others:
            other.began(observation)

    def ended(self, observation: Observation) -> None:
        """It is over."""
        self._metrics.count(observation)
        for other in self._others:
            other.ended(observation)
