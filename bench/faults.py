"""Every part of a running service killed in turn, while requests keep coming.

A service with two real engines and two gateway processes, asked by clients that each send the next
request when the last one is answered. Then SIGKILL, one part after the other, each once the one
before is back. A request is lost when its status is not 200, when its answer is not of the model
that was asked for, or when its connection breaks. Those that were under way at the moment of the
kill may be lost where the part held them: an engine's death takes the requests on it, as the death
of a private Ray's head takes all engines; a gateway process' death the connections to it. Of all
others, and of every later request, none may be lost.

Last, unless `--quick`, a whole node: a second service, on a Ray cluster of three nodes of this
machine, one of which, with an engine, is killed and not replaced. Full service is then that every
expert has a home again.

    .venv/bin/python bench/faults.py [--quick] [--only PART ...] [--report FILE]
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from _report import Report, parser
from _served import MARK, Served, made_world, served

from deploy.output import note, say, table

WORK = Path("runs/bench/faults")
CLIENTS = 8
PAUSE_S = 0.05
TOKENS = 8
MODELS = ("expert-0000", "expert-0001", "expert-0002", "tiny", "introvert")
QUESTION = "how many moons does Jupiter have? number {}"
BEFORE_S = 3.0
"""Load before the kill, and after full service."""
STEADY_S = 2.0
"""For so long must all be well before it counts as full service."""
LONGEST_S = 300.0
"""For all engines to be started at once on a machine that has other work."""
QUEUE_S = LONGEST_S
"""How long the gateway keeps a request whose only engine is away."""


@dataclass(frozen=True)
class Part:
    """Something that can be killed."""

    key: str
    find: Callable[[Served], list[psutil.Process]]
    holds_requests: bool
    """Whether requests are in its hands, so that those under way go down with it."""
    returns: bool = True
    """Whether something starts it again."""
    takes_engines: bool = False
    """Whether all engines end with it, which have a moment to do so and answer until then."""
    below: bool = False
    """Whether all that it started dies in the same moment, as on a machine that is lost."""


@dataclass(frozen=True)
class Asked:
    """One request as its client saw it."""

    began: float
    ended: float
    fault: str
    """What was wrong; empty where nothing was."""


@dataclass
class Traffic:
    """Clients that never stop asking."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    over: bool = False

    async def client(self, http: aiohttp.ClientSession, number: int) -> None:
        turn = number
        while not self.over:
            began = time.monotonic()
            model = MODELS[turn % len(MODELS)]
            try:
                fault = await self.ask(http, model, turn)
            except (aiohttp.ClientError, TimeoutError) as error:
                fault = f"{model}: {type(error).__name__} {error}"
            self.asked.append(Asked(began, time.monotonic(), fault))
            turn += CLIENTS
            await asyncio.sleep(PAUSE_S)

    async def ask(self, http: aiohttp.ClientSession, model: str, turn: int) -> str:
        body = {"model": model, "prompt": QUESTION.format(turn), "max_tokens": TOKENS}
        async with http.post(f"{self.url}/v1/completions", json=body) as response:
            answer = await response.json(content_type=None)
            if response.status != 200:
                error = answer["error"]
                worker = response.headers.get("x-introvert-worker", "no worker")
                return f"{model}: {response.status} {error['code']} ({worker}) {error['message']}"
            by = str(answer["model"]).partition("@")[0]
            return "" if model in (by, "introvert") else f"{model}: answered by {by}"


def matching(*words: str) -> Callable[[Served], list[psutil.Process]]:
    """Finds a service's processes by words of their command line (or the title they have set)."""

    def find(service: Served) -> list[psutil.Process]:
        found = []
        for process in service.processes():
            try:
                line = process.cmdline() or [process.name()]
            except psutil.Error:
                continue
            if all(any(word in part for part in line) for word in words):
                found.append(process)
        return sorted(found, key=lambda process: process.pid)

    return find


def module(name: str) -> Callable[[Served], list[psutil.Process]]:
    """Finds `python -m NAME`."""

    def find(service: Served) -> list[psutil.Process]:
        found = []
        for process in service.processes():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if "-m" in line[:3] and name in line[:4]:
                found.append(process)
        return found

    return find


def nodes_with_engines(service: Served) -> list[psutil.Process]:
    """The raylets below which a worker runs."""
    workers = matching("ray::Worker")(service)
    return [parent for worker in workers if (parent := worker.parent()) is not None]


def engine_servers(service: Served) -> list[psutil.Process]:
    pids = [worker.pid for worker in service.table().workers if worker.pid]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


PARTS = (
    Part("gateway", module("server.gateway"), holds_requests=True),
    Part("control", module("server.control"), holds_requests=False),
    Part("controller", matching("ray::Controller"), holds_requests=False),
    Part("engine_core", matching("EngineCore"), holds_requests=True),
    Part("engine_server", engine_servers, holds_requests=True),
    Part("worker", matching("ray::Worker"), holds_requests=True),
    Part("ray_head", matching("gcs_server"), holds_requests=True, takes_engines=True),
    Part("ray_session", module("server.control.session"), holds_requests=True, takes_engines=True),
)
NODE = Part("ray_node", nodes_with_engines, holds_requests=True, returns=False, below=True)
QUICK = ("gateway", "control", "controller", "engine_core")


def well(service: Served, part: Part, killed: int, count: int, workers: int) -> bool:
    """Whether all is as it was, with another process in the killed one's place, and the control
    plane answers too."""
    try:
        status = service.status()
        routing = service.table()
        service.change()
        there = {process.pid for process in part.find(service)}
    except (OSError, psutil.Error):
        return False
    ready = routing.ready_workers(None)
    served_all = (
        status["ready"]["ready"]
        and killed not in there
        and all(worker.pid and psutil.pid_exists(worker.pid) for worker in ready)
        and all(routing.ready_workers(expert.served_name) for expert in routing.experts)
    )
    if not part.returns:
        return served_all and len(ready) < workers
    as_before = not status["ready"]["degraded"] and len(ready) == workers
    return served_all and as_before and len(there) >= count


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Death:
    """What became of a part that was killed."""

    killed: float
    gone: float
    """When it had ended, and what ends with it: a large process takes a moment, in which its
    connections still take what is sent."""
    full_service_s: float | None
    """Since the kill; none: not within the limit."""


async def kill(service: Served, part: Part, workers: int) -> Death:
    there = await asyncio.to_thread(part.find, service)
    victim = there[0]
    victims = [victim, *(victim.children(recursive=True) if part.below else [])]
    taken = await asyncio.to_thread(engine_servers, service) if part.takes_engines else []
    note(f"killing {part.key}: {victim.pid} of {[p.pid for p in there]}")
    killed = time.monotonic()
    for process in victims:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    while any(map(alive, (*victims, *taken))):  # noqa: ASYNC110 - processes have no event for it
        await asyncio.sleep(0.002)
    gone = time.monotonic()
    steady = None
    while time.monotonic() - killed < LONGEST_S:
        await asyncio.sleep(0.2)
        good = await asyncio.to_thread(well, service, part, victim.pid, len(there), workers)
        steady = (steady or time.monotonic()) if good else None
        if steady and time.monotonic() - steady >= STEADY_S:
            return Death(killed, gone, steady - killed)
    return Death(killed, gone, None)


async def run(service: Served, parts: Sequence[Part], report: Report) -> list[list[object]]:
    rows: list[list[object]] = []
    workers = len(service.table().workers)
    traffic = Traffic(service.url)
    timeout = aiohttp.ClientTimeout(total=LONGEST_S + 60)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        clients = [asyncio.create_task(traffic.client(http, i)) for i in range(CLIENTS)]
        for part in parts:
            if not await asyncio.to_thread(part.find, service):
                report.miss(f"{part.key}_lost_beyond", "requests", "== 0", "there is no such part")
                continue
            await asyncio.sleep(BEFORE_S)
            first = len(traffic.asked)
            death = await kill(service, part, workers)
            await asyncio.sleep(BEFORE_S)
            rows.append(judge(report, part, traffic.asked[first:], death))
            if death.full_service_s is None:
                note(f"{part.key} did not come back in {LONGEST_S:.0f} s; the rest is left out")
                break
        traffic.over = True
        await asyncio.gather(*clients)
    return rows


def judge(report: Report, part: Part, asked: Sequence[Asked], death: Death) -> list[object]:
    killed, took = death.killed, death.full_service_s
    lost = [a for a in asked if a.fault]
    under_way = [a for a in lost if part.holds_requests and a.began <= death.gone]
    beyond = len(lost) - len(under_way)
    for a in lost:
        note(f"  {a.began - killed:+7.2f} s to {a.ended - killed:+7.2f} s: {a.fault[:240]}")
    longest = max((a.ended - a.began for a in asked), default=0.0)
    report.add(f"{part.key}_lost_under_way", len(under_way), "requests")
    report.add(f"{part.key}_lost_beyond", beyond, "requests", "== 0")
    if took is None:
        why = f"not within {LONGEST_S:.0f} s"
        report.miss(f"{part.key}_full_service_s", "s", f"<= {LONGEST_S:.0f}", why)
    else:
        report.add(f"{part.key}_full_service_s", took, "s", f"<= {LONGEST_S:.0f}")
    return [part.key, len(asked), len(under_way), beyond, took, longest]


@contextmanager
def three_nodes() -> Iterator[dict[str, str]]:
    """A Ray cluster of three nodes, the head without room; the environment that names it."""
    from ray.cluster_utils import Cluster

    mark = uuid.uuid4().hex
    # for the nodes, which inherit it; as in deploy/ray-cluster.yaml
    os.environ |= {MARK: mark, "RAY_worker_niceness": "0"}
    room = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**room, "num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(**room)
        yield {"RAY_ADDRESS": cluster.address, MARK: mark}
    finally:
        cluster.shutdown()
        del os.environ[MARK]


def main() -> int:
    arguments = parser(__doc__ or "")
    keys = [part.key for part in (*PARTS, NODE)]
    arguments.add_argument("--only", nargs="+", choices=keys)
    options = arguments.parse_args()
    chosen = options.only or (QUICK if options.quick else keys)
    report = Report("faults")
    here = WORK.resolve()
    world = made_world(here)
    gateway = {"processes": 2, "queue_timeout_s": QUEUE_S}
    rows = []
    parts = [part for part in PARTS if part.key in chosen]
    if parts:
        with served(here, world, gateway=gateway) as service:
            rows += asyncio.run(run(service, parts, report))
    if NODE.key in chosen:
        with three_nodes() as env, served(here, world, env, gateway=gateway) as service:
            rows += asyncio.run(run(service, [NODE], report))
    headers = ["killed", "requests", "lost under way", "lost beyond", "full service s", "longest s"]
    say(table(headers, rows))
    report.conditions |= {"clients": CLIENTS, "tokens": TOKENS, "gateway": gateway}
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
