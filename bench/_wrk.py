"""Load by wrk: what it is told to send, and what it found."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEND = """\
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.headers["authorization"] = "Bearer none"
local bodies, made, turn = {bodies}, {{}}, 0
function init(args)
  for i, body in ipairs(bodies) do made[i] = wrk.format(nil, nil, nil, body) end
end
function request()
  turn = turn % #made + 1
  return made[turn]
end
function done(summary, latency, requests)
  io.write(string.format(
    'RESULT {{"requests":%d,"us":%d,"p50":%d,"p99":%d,"bad":%d,"broken":%d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    summary.errors.status, summary.errors.connect + summary.errors.read + summary.errors.write
      + summary.errors.timeout))
end
"""
NOTE_HEADER = """\
local notes = io.open({file}, "w")
function response(status, headers, body)
  notes:write(tostring(headers[{header}]), "\\n")
end
"""


@dataclass(frozen=True)
class Load:
    """What one run of wrk measured."""

    requests: int
    rps: float
    p50_ms: float
    p99_ms: float
    failed: int
    """Answers with a status other than 2xx or 3xx, and broken connections."""


def script(path: Path, bodies: Sequence[bytes]) -> Path:
    """A script that sends these bodies in turn."""
    path.write_text(SEND.format(bodies="{" + ",\n".join(_lua(b) for b in bodies) + "}"))
    return path


def noting(path: Path, sending: Path, header: str, notes: Path) -> Path:
    """The script `sending`, which also writes each answer's `header` to `notes`, a line each."""
    extra = NOTE_HEADER.format(file=_lua(bytes(notes)), header=_lua(header.encode()))
    path.write_text(sending.read_text() + extra)
    return path


def wrk(url: str, sending: Path, *, connections: int, seconds: int, core: int) -> Load:
    """Load `url` for some whole seconds with so many connections, from one thread on one core."""
    command = ["taskset", "-c", str(core), "wrk", "-t1", f"-c{connections}", "--timeout", "30s"]
    done = subprocess.run(
        [*command, f"-d{seconds}s", "-s", str(sending), url],
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    return Load(
        requests=found["requests"],
        rps=found["requests"] / (found["us"] / 1e6),
        p50_ms=found["p50"] / 1000,
        p99_ms=found["p99"] / 1000,
        failed=found["bad"] + found["broken"],
    )


def median(loads: Sequence[Load]) -> Load:
    """Each figure's median; failures add up."""
    return Load(
        requests=sum(load.requests for load in loads),
        rps=statistics.median(load.rps for load in loads),
        p50_ms=statistics.median(load.p50_ms for load in loads),
        p99_ms=statistics.median(load.p99_ms for load in loads),
        failed=sum(load.failed for load in loads),
    )


def _lua(text: bytes) -> str:
    """A Lua string literal."""
    plain = set(range(32, 127)) - {ord('"'), ord("\\")}
    return '"' + "".join(chr(b) if b in plain else f"\\{b:03d}" for b in text) + '"'
