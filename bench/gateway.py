"""This gateway, LiteLLM's proxy and vllm-router in front of the same constant reply.

nginx answers every request with one chat completion. The gateways stand on one core, nginx and
wrk on the other; one is measured at a time while the others are stopped, in turns, and the figures
are medians over the turns. Ours is the real process, `python -m server.gateway`, with a routing
table that names nginx as its only worker and a router fitted by `introvert fit`; routed requests
are distinct texts that the router was not fitted on.

The rivals are installed into environments of their own below `--rivals`. Without them the figures
that compare count as missed.

    .venv/bin/python bench/gateway.py [--quick] [--report FILE] [--corpus FILE] [--rivals DIR]
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from _behind import Texts, gateway, publish_fitted, table_of, texts
from _report import Report, parser
from _rivals import DEFAULT_DIRECTORY, LITELLM, VLLM_ROUTER
from _stand import Program, nginx
from _wrk import Load, median, noting, script, wrk

from configs.schema import RunConfig
from deploy.output import note, say, table

WORK = Path("runs/bench/gateway")
PATH = "/v1/chat/completions"
CONNECTIONS = (1, 32, 256)
PROMPTS = {"short": 0, "4kb": 4096}
"""Prompts and their bytes; 0: as short as they come."""
CELLS = [(connections, prompt) for prompt in PROMPTS for connections in CONNECTIONS]
QUICK_CELLS = [(1, "short"), (32, "short"), (256, "short"), (1, "4kb"), (32, "4kb")]
POOL = 4000
"""Distinct routed requests that wrk takes in turn, at the most."""
EXPLICIT, ROUTED = "introvert", "introvert_routed"
WARM_S = 1
DRAIN_S = 30


@dataclass
class Contender:
    """Somebody who answers chat completions."""

    key: str
    url: str
    scripts: dict[str, Path]
    """wrk's script for each prompt length."""
    program: Program | None = None
    loads: dict[tuple[int, str], list[Load]] = field(default_factory=dict)

    def measure(self, connections: int, prompt: str, seconds: int, core: int) -> None:
        if self.program:
            self.program.go_on()
            # what an earlier load has left behind is answered before this one begins
            self.program.wait_answering(self.url + PATH, DRAIN_S, explicit(0)[0])
        else:
            seconds = max(1, seconds // 2)  # nginx is as fast in any second as in the next
        try:
            load = wrk(
                self.url + PATH,
                self.scripts[prompt],
                connections=connections,
                seconds=seconds,
                core=core,
            )
        finally:
            if self.program:
                self.program.pause()
        self.loads.setdefault((connections, prompt), []).append(load)

    def typical(self, connections: int, prompt: str) -> Load:
        return median(self.loads[connections, prompt])


def body(model: str, text: str) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}).encode()


def scripts(here: Path, key: str, make: Callable[[int], list[bytes]]) -> dict[str, Path]:
    return {
        prompt: script(here / f"{key}-{prompt}.lua", make(size)) for prompt, size in PROMPTS.items()
    }


def explicit(size: int) -> list[bytes]:
    text = "How do I merge two tables?"
    return [body("expert-0000", (text + " ") * (size // len(text)) or text)]


def routed(queries: list[str], size: int) -> list[bytes]:
    """Distinct requests: single texts, or as many in a row as make `size` bytes."""
    if not size:
        return [body("introvert", query) for query in queries[:POOL]]
    long = []
    for start in range(min(len(queries), POOL // 10)):
        words, turn = "", start
        while len(words) < size:
            words += queries[turn % len(queries)] + ". "
            turn += 1
        long.append(body("introvert", words[:size]))
    return long


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--corpus", type=Path, metavar="FILE", help="JSONL with `text`")
    arguments.add_argument("--rivals", type=Path, metavar="DIR", default=DEFAULT_DIRECTORY)
    options = arguments.parse_args()
    report = Report("gateway")
    here = WORK.resolve()
    here.mkdir(parents=True, exist_ok=True)
    load_core, gateway_core = sorted(os.sched_getaffinity(0))[:2]
    said = texts(
        options.corpus,
        here,
        documents=3000 if options.quick else 15_000,
    )
    config = run_config(said, here)
    clusters = publish_fitted(config, here)
    versions = {}
    with ExitStack() as stack:
        upstream = stack.enter_context(nginx(here / "nginx", load_core))
        simple = scripts(here, "explicit", explicit)
        meant = scripts(here, "routed", lambda size: routed(said.queries, size))
        bare = Contender("bare", upstream, simple)
        program, url = stack.enter_context(
            gateway(config, table_of(config, [upstream]), here, core=gateway_core)
        )
        program.pause()
        ours = Contender(EXPLICIT, url, simple, program)
        by_meaning = Contender(ROUTED, url, meant, program)
        contenders = [bare, ours, by_meaning]
        for rival in (LITELLM, VLLM_ROUTER):
            versions[rival.key] = rival.install(options.rivals)
            if versions[rival.key]:
                program, url = stack.enter_context(
                    rival.serving(options.rivals, here, upstream, gateway_core, explicit(0)[0])
                )
                program.pause()
                contenders.append(Contender(rival.key, url, simple, program))
        turns, seconds = (2, 2) if options.quick else (5, 4)
        cells = QUICK_CELLS if options.quick else CELLS
        run_turns(contenders, cells, turns, seconds, load_core)
        routing = routing_times(by_meaning, here, seconds, load_core)
    fill(report, {c.key: c for c in contenders}, routing)
    report.conditions |= {
        "turns": turns,
        "seconds_each": seconds,
        "rivals": versions,
        "cores": {"gateways": gateway_core, "nginx and wrk": load_core},
        "router": {"source": said.source, "clusters": clusters, "queries": len(said.queries)},
        "load_average": os.getloadavg(),
    }
    say(overview(contenders))
    return report.close(options.report)


def run_config(said: Texts, here: Path) -> RunConfig:
    bundle, work = here / "bundle", here / "work"
    return RunConfig.model_validate(
        {
            "bundle": {"path": str(bundle), "work_dir": str(work)},
            "base": {"model": str(here / "base"), "name": "base"},
            "data": {"train": [str(said.corpus)]},
        }
    )


def run_turns(
    contenders: list[Contender],
    cells: list[tuple[int, str]],
    turns: int,
    seconds: int,
    core: int,
) -> None:
    for contender in contenders:
        contender.measure(32, "short", WARM_S, core)
        contender.loads.clear()
    for turn in range(turns):
        note(f"turn {turn + 1} of {turns}")
        for connections, prompt in cells:
            for contender in contenders:
                contender.measure(connections, prompt, seconds, core)


def routing_times(
    contender: Contender, here: Path, seconds: int, core: int
) -> dict[int, np.ndarray]:
    """Milliseconds that answers say were spent on routing, by connections."""
    found = {}
    assert contender.program
    for connections in (1, 32):
        notes = here / f"route-ms-{connections}.txt"
        header = "x-introvert-route-ms"
        sending = noting(here / "noting.lua", contender.scripts["short"], header, notes)
        contender.program.go_on()
        wrk(contender.url + PATH, sending, connections=connections, seconds=seconds + 1, core=core)
        contender.program.pause()
        lines = notes.read_text().split()
        found[connections] = np.array([float(line) for line in lines if line != "nil"])
    return found


def fill(report: Report, contenders: dict[str, Contender], routing: dict[int, np.ndarray]) -> None:
    ours, by_meaning, bare = (contenders[key] for key in (EXPLICIT, ROUTED, "bare"))
    for prompt in PROMPTS:
        added = ours.typical(1, prompt).p50_ms - bare.typical(1, prompt).p50_ms
        report.add(f"added_p50_ms_c1_{prompt}", added, "ms", "<= 0.5")
        added = by_meaning.typical(1, prompt).p50_ms - bare.typical(1, prompt).p50_ms
        report.add(f"routed_added_p50_ms_c1_{prompt}", added, "ms")
    for connections, prompt in bare.loads:
        goals = connections >= 32 and prompt == "short"
        compare(report, contenders, connections, prompt, goals=goals)
    for connections, times in routing.items():
        # With more connections the core is full, and the time is that of the queue before it.
        goals = connections == 1
        p50, p99 = np.percentile(times, [50, 99])
        report.add(f"route_p50_ms_c{connections}", float(p50), "ms", "<= 0.3" if goals else None)
        report.add(f"route_p99_ms_c{connections}", float(p99), "ms", "<= 3" if goals else None)
    failed = sum(
        load.failed for c in (ours, by_meaning) for loads in c.loads.values() for load in loads
    )
    report.add("failed_requests", failed, "requests", "== 0")


def compare(
    report: Report, contenders: dict[str, Contender], connections: int, prompt: str, *, goals: bool
) -> None:
    """Requests a second of everybody, and how many times a rival's ours are."""
    where = f"c{connections}_{prompt}"
    for key, contender in contenders.items():
        report.add(f"{key}_rps_{where}", contender.typical(connections, prompt).rps, "requests/s")
    for ours, goal in ((EXPLICIT, ">= 25"), (ROUTED, ">= 10")):
        for rival, wanted in ((LITELLM.key, goal if goals else None), (VLLM_ROUTER.key, None)):
            key = f"{ours}_times_{rival}_{where}"
            if rival not in contenders:
                report.miss(key, "times", wanted, f"{rival} is not installed")
                continue
            theirs = contenders[rival].typical(connections, prompt).rps
            if not theirs:
                report.miss(key, "times", wanted, f"{rival} answered nothing in its time")
                continue
            report.add(
                key, contenders[ours].typical(connections, prompt).rps / theirs, "times", wanted
            )


def overview(contenders: list[Contender]) -> str:
    rows = []
    for connections, prompt in contenders[0].loads:
        for contender in contenders:
            load = contender.typical(connections, prompt)
            cells = [round(load.rps), load.p50_ms, load.p99_ms, load.failed]
            rows.append([prompt, connections, contender.key, *cells])
    headers = ["prompt", "connections", "gateway", "requests/s", "p50 ms", "p99 ms", "failed"]
    return table(headers, rows)


if __name__ == "__main__":
    sys.exit(main())
