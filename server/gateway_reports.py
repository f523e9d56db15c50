"""What gateway processes tell of themselves, over their Unix sockets in the run directory.

For the control plane, the driver and the processes among themselves. Knows nothing of what a
gateway does with a request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from pathlib import Path

import aiohttp
import msgspec

from server.sockets import reachable
from server.table import GATEWAY_SOCKET

REPORT_PATH = "/internal/report"
TIMEOUT_S = 5.0
_NAME = re.compile(GATEWAY_SOCKET.replace("{}", r"(\d+)"))


class GatewayReport(msgspec.Struct, frozen=True):
    """One process, as it sees itself."""

    process: int
    """Its number."""
    pid: int
    started: str
    """UTC, ISO 8601."""
    table_version: int
    """Of the routing table in use; 0 before the first."""
    bundle: str
    """Version of the bundle that is served; empty before the first table."""
    routers: dict[str, str]
    """By bundle version: `ready`, or `loading`, `failed` or `mismatched` and why."""
    in_flight: dict[str, int]
    """Requests in flight, by worker."""
    in_flight_bundles: dict[str, int]
    """Requests in flight, by the bundle version that they began with."""
    demand: dict[str, float]
    """By expert: engine seconds asked for since the process started."""


class SocketError(Exception):
    """Nobody answers at a Unix socket, or not as agreed; the text says why."""


async def gather_reports(run_dir: Path) -> list[GatewayReport]:
    """The reports of all processes that answer, in the order of their numbers."""
    sockets = await asyncio.to_thread(_sockets, run_dir)
    answers = await ask_all(sockets, REPORT_PATH)
    reports = [msgspec.json.decode(body, type=GatewayReport) for body in answers.values()]
    return sorted(reports, key=lambda report: report.process)


def _sockets(run_dir: Path) -> list[Path]:
    return [one for one in run_dir.glob(GATEWAY_SOCKET.format("*")) if _NAME.fullmatch(one.name)]


async def ask_all(sockets: Iterable[Path], path: str) -> dict[Path, bytes]:
    """What a GET of a path answers at each socket, all asked at once; the silent are left out."""
    named = list(sockets)
    answers = await asyncio.gather(
        *(ask(one, "GET", path) for one in named), return_exceptions=True
    )
    found = {}
    for one, answer in zip(named, answers, strict=True):
        if isinstance(answer, SocketError):
            continue
        if isinstance(answer, BaseException):
            raise answer
        status, body = answer
        if status == 200:
            found[one] = body
    return found


async def ask(
    at: Path, method: str, path: str, body: bytes | None = None, timeout_s: float = TIMEOUT_S
) -> tuple[int, bytes]:
    """Status and body of one request to a Unix socket.

    Raises:
        SocketError: nobody answers.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    headers = {"content-type": "application/json"} if body is not None else {}
    try:
        with reachable(at) as address:
            connector = aiohttp.UnixConnector(address)
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.request(
                    method, f"http://gateway{path}", data=body, headers=headers
                ) as answer,
            ):
                return answer.status, await answer.read()
    except (OSError, aiohttp.ClientError, TimeoutError) as error:
        raise SocketError(f"{at.name} does not answer ({error or type(error).__name__})") from None
