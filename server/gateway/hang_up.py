"""Connections that tell when their client hangs up.

ASGI tells it to whoever waits for the next message: a task beside each request, which was a seventh
of a forwarded one's time, and whose cancellation left a cycle to the garbage collector (decision
0009). Here it is a call. Knows nothing of what is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

EXTENSION = "introvert.hang_up"
"""Name among the extensions of a request's scope."""

Watchers = set[Callable[[], None]]
"""What is called once the client has hung up. Whoever adds to it takes it out again."""


def watchers_of(scope: Scope) -> Watchers:
    """Those of the connection that a request came over; of any other server nobody's."""
    found: Watchers | None = scope.get("extensions", {}).get(EXTENSION)
    return set() if found is None else found


class WatchedConnection(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._extensions: dict[str, Watchers] = {EXTENSION: set()}
        self._running: RequestResponseCycle | None = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """A request is begun, maybe after one that it came behind."""
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        """A request begins to come."""
        super().on_message_begin()
        self.scope["extensions"] = self._extensions  # type: ignore[typeddict-item]

    def on_message_complete(self) -> None:
        """A request is whole. uvicorn stops reading while much of a body waits to be taken, and
        who does not read does not see the end; of pipelined requests the end comes later."""
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        # uvicorn tells the request that came last, which may wait behind the one that runs.
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
        for waiting, _ in self.pipeline:
            waiting.on_response = _nothing  # it holds the connection, which holds the request
        watchers = self._extensions[EXTENSION]
        while watchers:
            watchers.pop()()


def _nothing() -> None:
    pass
