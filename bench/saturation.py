"""Two real engines at saturation, asked through the gateway and straight, in turns.

Both ways take the same requests: so many at once that the engines are never idle, each engine's
share fixed by the experts that are asked for, the answers of the same lengths. Client,
gateway and engines share the machine's cores; where these are no more than the engines', what the
gateway uses is taken from the engines, which on a GPU it is not. So its use of the processor is
told, too.

    .venv/bin/python bench/saturation.py [--quick] [--report FILE]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from _report import Report, parser
from _served import Served, made_world, served

from deploy.output import note, say, table

WORK = Path("runs/bench/saturation")
AT_ONCE = 32
TOKENS = (48, 56, 64, 72, 80)
"""Of the answers in turn: unequal, so that they do not all end together."""
PATH = "/v1/completions"
PROMPT = "Tell me something about the orbit of Jupiter and the rings of Saturn, number {}."


@dataclass(frozen=True)
class Ask:
    """One request: where it goes and as what."""

    root: str
    model: str
    headers: dict[str, str]


@dataclass
class Seen:
    """What one way of asking has shown, turn by turn."""

    tokens_per_s: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    gateway_core: list[float] = field(default_factory=list)
    """Share of a core that the gateway used."""
    failed: int = 0


@dataclass
class Window:
    """The time in which answers count, so that neither start nor end is in it."""

    begin: float
    end: float
    tokens: float = 0
    first_ms: list[float] = field(default_factory=list)
    failed: int = 0

    def share(self, began: float, ended: float) -> float:
        """Share of an interval that lies within."""
        inside = min(ended, self.end) - max(began, self.begin)
        return max(0.0, inside) / (ended - began)


async def client(
    http: aiohttp.ClientSession, asks: Sequence[Ask], number: int, window: Window, *, stream: bool
) -> None:
    turn = number
    while time.perf_counter() < window.end:
        ask = asks[turn % len(asks)]
        body: dict[str, Any] = {"model": ask.model, "prompt": PROMPT.format(turn)}
        tokens = TOKENS[(turn + turn // AT_ONCE) % len(TOKENS)]
        body |= {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
        turn += AT_ONCE
        began = time.perf_counter()
        first = 0.0
        try:
            async with http.post(ask.root + PATH, json=body, headers=ask.headers) as response:
                if response.status != 200:
                    raise aiohttp.ClientPayloadError(await response.text())
                if stream:
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            now = time.perf_counter()
                            first = first or now
                            window.tokens += window.begin <= now < window.end
                else:
                    await response.read()
                    window.tokens += tokens * window.share(began, time.perf_counter())
        except aiohttp.ClientError as error:
            note(f"  {ask.root}: {error}")
            window.failed += 1
            continue
        if first and window.begin <= began < window.end:
            window.first_ms.append((first - began) * 1000)


async def load(asks: Sequence[Ask], seconds: float, *, stream: bool) -> Window:
    """So many at once for a second and then for `seconds`, which count."""
    begin = time.perf_counter() + 1.0
    window = Window(begin, begin + seconds)
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        await asyncio.gather(
            *(client(http, asks, i, window, stream=stream) for i in range(AT_ONCE))
        )
    return window


def asks_of(service: Served) -> tuple[list[Ask], list[Ask]]:
    """The same models in the same order, through the gateway and straight to a home of each.

    Half of the requests are for each worker; an expert with two homes is asked of each in turn.
    """
    routing = service.table()
    urls = {worker.id: worker.url for worker in routing.workers}
    lists = {
        worker.id: [home.id for home in routing.experts if worker.id in home.workers]
        for worker in routing.workers
    }
    assert all(lists.values()), "each engine has an expert"
    through, straight = [], []
    key = service.engine_headers()
    names = {home.id: home.served_name for home in routing.experts}
    for turn in range(12):
        for worker, experts in lists.items():
            expert = experts[turn % len(experts)]
            through.append(Ask(service.url, expert, {}))
            straight.append(Ask(str(urls[worker]), names[expert], key))
    return through, straight


class Processor:
    """What the gateway's processes have used of it."""

    def __init__(self, service: Served) -> None:
        """From now on."""
        self._gateways = [p for p in service.processes() if "server.gateway" in p.cmdline()]
        self._began, self._used = time.perf_counter(), self._seconds()

    def share(self) -> float:
        """Of a core, since the beginning."""
        return (self._seconds() - self._used) / (time.perf_counter() - self._began)

    def _seconds(self) -> float:
        return sum(p.cpu_times().user + p.cpu_times().system for p in self._gateways)


def measure(service: Served, turns: int, seconds: float) -> dict[tuple[str, bool], Seen]:
    through, straight = asks_of(service)
    found = {(way, stream): Seen() for way in ("gateway", "straight") for stream in (False, True)}
    ways = [("gateway", through), ("straight", straight)]
    for stream in (False, True):
        asyncio.run(load(through, 2.0, stream=stream))
    for turn in range(turns):
        for stream in (False, True):
            # whoever is first in one turn is second in the next: a drift favours neither
            for way, asks in ways if turn % 2 == 0 else reversed(ways):
                processor = Processor(service)
                window = asyncio.run(load(asks, seconds, stream=stream))
                seen = found[way, stream]
                seen.gateway_core.append(processor.share())
                seen.tokens_per_s.append(window.tokens / seconds)
                seen.first_ms += window.first_ms
                seen.failed += window.failed
                note(
                    f"  {way} {'stream' if stream else 'whole'}: {seen.tokens_per_s[-1]:.0f} tok/s"
                )
    return found


def main() -> int:
    options = parser(__doc__ or "").parse_args()
    report = Report("saturation")
    here = WORK.resolve()
    turns, seconds = (4, 4.0) if options.quick else (16, 6.0)
    with served(here, made_world(here)) as service:
        found = measure(service, turns, seconds)
    rows = []
    for (way, stream), seen in found.items():
        kind = "stream" if stream else "whole"
        middle = statistics.median(seen.tokens_per_s)
        first = statistics.median(seen.first_ms) if seen.first_ms else None
        core = statistics.median(seen.gateway_core)
        report.add(f"{way}_{kind}_tokens_per_s", middle, "tokens/s")
        report.add(f"{way}_{kind}_gateway_core", core, "of a core")
        rows.append([way, kind, middle, first, core, seen.failed])
    for stream, key, goal in (
        (False, "throughput_ratio", ">= 0.97"),
        (True, "stream_throughput_ratio", None),
    ):
        # each turn's two loads lie next to each other, so their ratio is free of slower drifts
        pairs = zip(
            found["gateway", stream].tokens_per_s,
            found["straight", stream].tokens_per_s,
            strict=True,
        )
        report.add(key, statistics.median(a / b for a, b in pairs), "", goal)
    ttft = {way: statistics.median(found[way, True].first_ms) for way in ("gateway", "straight")}
    report.add("ttft_p50_ms_gateway", ttft["gateway"], "ms")
    report.add("ttft_p50_ms_straight", ttft["straight"], "ms")
    report.add("added_ttft_p50_ms", ttft["gateway"] - ttft["straight"], "ms", "< 5")
    failed = sum(seen.failed for seen in found.values())
    report.add("failed_requests", failed, "requests", "== 0")
    headers = ["way", "answers", "tokens/s", "TTFT p50 ms", "gateway, of a core", "failed"]
    say(table(headers, rows))
    report.conditions |= {
        "at_once": AT_ONCE,
        "tokens": TOKENS,
        "turns": turns,
        "seconds_each": seconds,
        "engines": "2, a random Llama of 2 layers x 128, 3 experts of rank 4",
    }
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
