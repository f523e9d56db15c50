"""Who is told of every request: metrics always, the access log and traces where configured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from importlib.metadata import version as package_version
from typing import Protocol

from configs.schema import GatewayConfig
from server.gateway.metrics import Metrics
from server.gateway.observation import Observation, Recorder


class Listener(Recorder, Protocol):
    """Somebody who is told, and has something to end."""

    def close(self) -> None:
        """Finish; may take seconds, so not on the event loop."""
        ...


class RequestRecorder:
    """Tells the metrics and whoever else listens; see `server.gateway.observation.Recorder`."""

    def __init__(self, metrics: Metrics, listeners: Sequence[Listener] = ()) -> None:
        self._metrics = metrics
        self._listeners = tuple(listeners)

    def began(self, observation: Observation) -> None:
        """A request has come."""
        for listener in self._listeners:
            listener.began(observation)

    def ended(self, observation: Observation) -> None:
        """It is over."""
        observation.ended = observation.ended or time.perf_counter()
        self._metrics.count(observation)
        for listener in self._listeners:
            listener.ended(observation)

    async def close(self) -> None:
        """Finish."""
        await asyncio.gather(*(asyncio.to_thread(one.close) for one in self._listeners))


def listeners_for(config: GatewayConfig, process: int) -> list[Listener]:
    """The access log and traces, where they are configured; imported only then."""
    listeners: list[Listener] = []
    if config.otlp_endpoint is not None:  # first: it gives requests their trace
        from server.gateway.traces import Traces

        listeners.append(
            Traces(
                config.otlp_endpoint,
                share=config.trace_share,
                version=package_version("introvert"),
                process=process,
            )
        )
    if config.access_log:
        from server.gateway.access_log import AccessLog

        listeners.append(AccessLog())
    return listeners
