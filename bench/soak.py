"""A thousand streams at once against an engine that sends a token a second.

The gateway is the real process; the engine is a small server (`_slow.py`). Each client asks for a
stream of 30 tokens (with `--quick` 10) and, when it has all of them, for the next; so streams begin
and end all the time while a thousand run. A stream is dropped when its status is not 200, when it
lacks a token or its end, or when its connection breaks. Memory, open file descriptors and the
engine's connections are read from outside once a second and drawn beside the report.

    .venv/bin/python bench/soak.py [--quick] [--minutes 10] [--streams 1000] [--report FILE]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from _behind import gateway, make_table
from _plot import Panel, draw
from _report import Report, parser
from _stand import DIRECT, free_port, running

from configs.schema import RunConfig
from deploy.output import note, say

WORK = Path("runs/bench/soak")
EXPERT = "expert-0000@aaaaaaaaaaaa"
PROBE = b'{"model": "expert-0000", "prompt": "x", "max_tokens": 1, "stream": true}'
LONG, SHORT = 30, 10
"""Tokens of a stream, so its seconds; the short ones are for `--quick`."""
SETTLE_S = 20.0
"""After the last stream, before descriptors and connections are compared with the beginning."""
WARM_GENERATIONS = 2.5
"""Lengths of a stream after which memory must be flat: pools and arenas fill until then."""
MIB = 2**20


@dataclass
class Soak:
    """What the clients saw, and what the gateway's process held."""

    url: str
    tokens: int
    finished: int = 0
    dropped: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    descriptors: list[float] = field(default_factory=list)
    engine_connections: list[float] = field(default_factory=list)
    streams: list[float] = field(default_factory=list)

    async def client(self, http: aiohttp.ClientSession, delay: float, until: float) -> None:
        """Stream after stream; the first after `delay` seconds."""
        await asyncio.sleep(delay)
        while time.monotonic() < until:
            try:
                fault = await self.stream(http)
            except (aiohttp.ClientError, TimeoutError) as error:
                fault = repr(error)
            if fault:
                self.dropped.append(fault)
                await asyncio.sleep(0.5)
            else:
                self.finished += 1

    async def stream(self, http: aiohttp.ClientSession) -> str:
        """One stream; what was wrong with it, empty where nothing was."""
        body = {"model": "expert-0000", "prompt": "x", "max_tokens": self.tokens, "stream": True}
        async with http.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status != 200:
                return f"{response.status}: {(await response.text())[:200]}"
            text = await response.text()
        events = [line for line in text.split("\n") if line.startswith("data: ")]
        if len(events) != self.tokens + 1 or events[-1] != "data: [DONE]":
            return f"{len(events)} events, the last {events[-1:]}"
        return ""

    def look(self, began: float, process: psutil.Process, engine: str) -> None:
        """Note what the gateway holds now."""
        with DIRECT.open(f"{engine}/open", timeout=10) as answer:
            open_now = json.load(answer)
        self.seconds.append(time.monotonic() - began)
        self.rss_mib.append(process.memory_info().rss / MIB)
        self.descriptors.append(process.num_fds())
        self.engine_connections.append(open_now["connections"] - 1)  # less this question's own
        self.streams.append(open_now["streams"])


async def soak(run: Soak, process: psutil.Process, engine: str, minutes: float, count: int) -> None:
    began = time.monotonic()
    until = began + minutes * 60

    async def watch() -> None:
        while True:
            await asyncio.to_thread(run.look, began, process, engine)
            if len(run.seconds) % 30 == 0:
                note(
                    f"{run.seconds[-1]:5.0f} s  {run.streams[-1]:5.0f} streams  "
                    f"{run.rss_mib[-1]:6.1f} MiB  {run.finished} finished  "
                    f"{len(run.dropped)} dropped"
                )
            await asyncio.sleep(1.0)

    timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        watching = asyncio.create_task(watch())
        clients = [run.client(http, run.tokens * i / count, until) for i in range(count)]
        await asyncio.gather(*clients)
    watched = asyncio.create_task(asyncio.sleep(SETTLE_S))
    await asyncio.wait([watching, watched], return_when=asyncio.FIRST_COMPLETED)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


def fill(report: Report, run: Soak, count: int) -> None:
    report.add("streams_at_once", max(run.streams), "streams", f">= {count}")
    report.add("streams_finished", run.finished, "streams", "> 0")
    report.add("streams_dropped", len(run.dropped), "streams", "== 0")
    full = [
        rss
        for second, rss, streams in zip(run.seconds, run.rss_mib, run.streams, strict=True)
        if streams >= 0.95 * count and second > WARM_GENERATIONS * run.tokens
    ]
    fifth = max(1, len(full) // 5)
    report.add("rss_peak_mib", max(run.rss_mib), "MiB")
    if full:
        grown = statistics.mean(full[-fifth:]) - statistics.mean(full[:fifth])
        report.add("rss_growth_mib", grown, "MiB", "<= 5")
    else:
        report.miss("rss_growth_mib", "MiB", "<= 5", "never were all streams there")
    report.add("descriptors_left", run.descriptors[-1] - run.descriptors[0], "fds", "<= 0")
    left = run.engine_connections[-1] - run.engine_connections[0]
    report.add("engine_connections_left", left, "connections", "<= 0")
    report.add("engine_streams_left", run.streams[-1], "streams", "== 0")


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--minutes", type=float, help="default: 10, with --quick 1")
    arguments.add_argument("--streams", type=int, default=1000)
    options = arguments.parse_args()
    minutes = options.minutes or (1.0 if options.quick else 10.0)
    here = WORK.resolve()
    here.mkdir(parents=True, exist_ok=True)
    config = RunConfig.model_validate(
        {
            "bundle": {"path": str(here / "no-bundle")},
            "base": {"model": "base"},
            "data": {"train": ["unused.jsonl"]},
            "gateway": {"worker_concurrency": 2 * options.streams, "spill_wait_s": None},
        }
    )
    report = Report("soak")
    with ExitStack() as stack:
        port = free_port()
        engine = f"http://127.0.0.1:{port}"
        command = [sys.executable, Path(__file__).with_name("_slow.py"), "--port", str(port)]
        program = stack.enter_context(running(command, here / "slow.log"))
        program.wait_answering(f"{engine}/open", 30)
        program, url = stack.enter_context(
            gateway(config, make_table(config, [engine], [EXPERT]), here, probe=PROBE)
        )
        run = Soak(url, SHORT if options.quick else LONG)
        process = psutil.Process(program.process.pid)
        asyncio.run(soak(run, process, engine, minutes, options.streams))
    fill(report, run, options.streams)
    plot = Path(options.report).with_suffix(".svg") if options.report else here / "soak.svg"
    panels = [
        Panel("resident memory of the gateway, MiB", run.rss_mib),
        Panel("streams at the engine", run.streams),
        Panel("open file descriptors of the gateway", run.descriptors),
        Panel("connections at the engine", run.engine_connections),
    ]
    draw(plot, f"{options.streams} streams, a token a second", run.seconds, panels)
    say(f"plot: {plot}")
    for fault in sorted(set(run.dropped))[:5]:
        say(f"dropped: {fault}")
    report.conditions |= {"minutes": minutes, "streams": options.streams, "tokens": run.tokens}
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
