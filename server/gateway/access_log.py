"""Every request as a line of JSON on standard error, written by a thread of its own.

A reader of the log that is slow, or a disk that is, holds up no request: lines that pile up beyond
a bound are left out, and counted.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import Any

import msgspec

from server.gateway.observation import Observation

MAX_WAITING = 65_536
"""Lines that may wait to be written."""
WRITE_INTERVAL_S = 0.1
CLOSE_TIMEOUT_S = 2.0


class AccessLog:
    """Writes down what became of each request; see `server.gateway.observation.Recorder`."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Write to a file descriptor; default: standard error."""
        self._descriptor = sys.stderr.fileno() if descriptor is None else descriptor
        self._waiting: deque[tuple[float, Observation]] = deque()
        self._left_out = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="access-log", daemon=True)
        self._thread.start()

    def began(self, observation: Observation) -> None:
        """Nothing to write yet."""

    def ended(self, observation: Observation) -> None:
        """Have the request written down."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append((time.time(), observation))
        else:
            self._left_out += 1

    def close(self) -> None:
        """Write what waits, for a moment at most."""
        self._ending.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _keep_writing(self) -> None:
        try:
            while not self._ending.wait(WRITE_INTERVAL_S):
                self._write()
            self._write()
        except OSError:
            return  # nobody reads any more; requests go on

    def _write(self) -> None:
        lines = []
        while self._waiting:
            at, observation = self._waiting.popleft()
            lines.append(msgspec.json.encode(line_of(observation, at)))
        left_out, self._left_out = self._left_out, 0
        if left_out:
            text = f"{left_out} requests are not in the access log: it was read too slowly"
            lines.append(msgspec.json.encode({**_head(time.time()), "message": text}))
        data = b"".join(line + b"\n" for line in lines)
        while data:
            data = data[os.write(self._descriptor, data) :]


def line_of(request: Observation, at: float) -> dict[str, Any]:
    """A request's line: what is not known of it is left out.

    Args:
        request: one that is over.
        at: when it was over, seconds since the epoch.
    """
    route = request.route
    line = {
        **_head(at),
        "request_id": request.request_id,
        "endpoint": request.endpoint,
        "status": request.status,
        "error": request.error,
        "tenant": request.tenant,
        "bundle": request.bundle,
        "expert": request.expert,
        "expert_version": request.expert_version,
        "worker": request.worker,
        "routed_by": request.routed_by,
        "route_score": round(route.score, 4) if route else None,
        "abstained": route.abstained if route else None,
        "spill": request.spill,
        "cold": request.cold or None,
        "streamed": request.streamed,
        "retries": request.retries or None,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "total_ms": _ms(request.ended - request.began) if request.began else None,
        "route_ms": _ms(request.route_s) if route else None,
        "queue_ms": _ms(request.queue_s),
        "engine_ms": _ms(request.engine_s) if request.engine_s else None,
        "overhead_ms": None if request.overhead_s is None else _ms(request.overhead_s),
    }
    return {name: value for name, value in line.items() if value is not None and value != ""}


def _head(at: float) -> dict[str, Any]:
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return {"time": moment, "level": "info", "logger": "server.gateway.access"}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
