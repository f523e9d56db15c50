"""The engines' own metrics, gathered and told apart by a `worker` label.

A scraper that cannot reach the engines, which listen on whichever port was free, has them here. Of
what the engines count this module knows nothing: it moves lines of Prometheus' text format.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping

import aiohttp

from server.table import RoutingTable

ENGINE_TIMEOUT_S = 5.0
MAX_BYTES = 16 * 1024 * 1024
"""Of one engine's answer; one that is longer is left out."""
_SAMPLE = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*[{ ]")
KEPT_S = 1.0
"""A scrape within this time of the last gets the same: asking is free for clients and is not for
engines."""


class Federation:
    """Asks all ready workers' engines."""

    def __init__(
        self, table: Callable[[], RoutingTable | None], engine_key: str | None = None
    ) -> None:
        """Nothing is asked yet.

        Args:
            table: hands out the routing table in use.
            engine_key: what engines ask for; none: nothing.
        """
        self._table = table
        self._headers = {"authorization": f"Bearer {engine_key}"} if engine_key else {}
        self._asking = asyncio.Lock()
        self._kept: tuple[float, bytes] | None = None

    async def all(self) -> bytes:
        """Every engine's metrics in one text."""
        async with self._asking:
            if self._kept is None or time.monotonic() - self._kept[0] > KEPT_S:
                body = await self._gather()
                self._kept = (time.monotonic(), body)
            return self._kept[1]

    async def _gather(self) -> bytes:
        table = self._table()
        urls = {
            worker.id: worker.url
            for worker in (table.ready_workers(None) if table else [])
            if worker.url is not None
        }
        timeout = aiohttp.ClientTimeout(total=ENGINE_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers) as session:
            texts = await asyncio.gather(*(_metrics_of(session, url) for url in urls.values()))
        return await asyncio.to_thread(together, dict(zip(urls, texts, strict=True)))


async def _metrics_of(session: aiohttp.ClientSession, url: str) -> str | None:
    """An engine's metrics; none where it does not tell them."""
    try:
        async with session.get(f"{url.rstrip('/')}/metrics", allow_redirects=False) as answer:
            if answer.status != 200:
                return None
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > MAX_BYTES:
                    return None
            return body.decode("utf-8", errors="replace")
    except (OSError, aiohttp.ClientError, TimeoutError):
        return None


def together(texts: Mapping[str, str | None]) -> bytes:
    """Several workers' metrics as one text, the samples of a family together as the format asks.

    Args:
        texts: by worker; none: it did not answer.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    for worker, text in texts.items():
        label = f'worker="{_escaped(worker)}"'
        current = ""
        for line in (text or "").splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                current = line.split(" ", 3)[2]
                head, _ = families.setdefault(current, ([], []))
                if not any(known.startswith(line[:7]) for known in head):
                    head.append(line)
            elif _SAMPLE.match(line):
                name = line.partition("{")[0].partition(" ")[0]
                family = current if current and name.startswith(current) else name
                families.setdefault(family, ([], []))[1].append(_labelled(line, label))
    lines = ["# HELP introvert_engine_up Whether the worker's engine told its metrics."]
    lines.append("# TYPE introvert_engine_up gauge")
    lines += [
        f'introvert_engine_up{{worker="{_escaped(worker)}"}} {int(text is not None)}'
        for worker, text in texts.items()
    ]
    for head, samples in families.values():
        lines += [*head, *samples]
    return ("\n".join(lines) + "\n").encode()


def _labelled(line: str, label: str) -> str:
    """A sample with one label more."""
    name, brace, rest = line.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label}{'' if rest.startswith('}') else ','}{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{label}}} {value}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
