"""The offline batch job against the gateway and against vLLM's own offline interface.

One run, in turns: the job on two engines of its own, the same requests through the gateway to two
engines at high concurrency, and `LLM.generate` on two engines that are each given half of the
prompts, sorted by expert already. Shuffled input, equal answers of equal length. Nothing of the
start of any of them is counted. Beside it: how fast lines are read and routed, and how much memory
a job of a million lines takes, with an engine that is a stub.

    .venv/bin/python bench/batch.py [--quick] [--report FILE] [--experts N] [--rank R]
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from _many import Many, made_many, texts, write_lines
from _report import Report, parser
from _served import served

from deploy.output import note, say, table

# This file's folder would hide the package of the same name as one of its files.
sys.path.remove(str(Path(__file__).resolve().parent))

from server.batch.job import run_job
from server.batch.types import Counts, JobSpec

HERE = Path(__file__).resolve().parent
WORK = Path("runs/bench/batch")
SLOTS = 8
TOKENS = 16
AT_ONCE = 128
MEMORY_GOAL_GIB = 1.5


class Own:
    """The batch job, with engines that stay between turns."""

    name = "batch job"

    def __init__(self, stack: ExitStack, many: Many, here: Path, source: Path) -> None:
        from server.batch.engines import BatchEngines

        self._engines = stack.enter_context(BatchEngines(many.config(here / "own", SLOTS)))
        self._here, self._source = here, source

    def turn(self) -> float:
        counts = asyncio.run(self._turn())
        assert counts.failed == 0, counts
        return counts.done / counts.seconds["answering"]

    async def _turn(self) -> Counts:
        from router.model import Router
        from server.batch.own import OwnBackend

        engines = self._engines
        backend = OwnBackend(
            engines.bundle.manifest,
            Router.load(engines.bundle.router_dir, device="cpu"),
            table=lambda: engines.table,
            demand=engines.demand,
            engine_key=engines.engine_key,
        )
        spec = JobSpec(
            inputs=(str(self._source),),
            output=str(self._here / "out.jsonl"),
            errors=str(self._here / "errors.jsonl"),
            work=self._here / "ledger",
        )
        shutil.rmtree(spec.work, ignore_errors=True)
        async with backend:
            return await run_job(spec, backend, lambda _: None)


class Gateway:
    """The same requests through the gateway, so many at once."""

    name = "gateway"

    def __init__(self, stack: ExitStack, many: Many, here: Path, lines: list[Any]) -> None:
        self._url = stack.enter_context(served(here / "gateway", _World(many))).url  # type: ignore[arg-type]
        self._lines = lines

    def turn(self) -> float:
        return asyncio.run(self._turn())

    async def _turn(self) -> float:
        waiting = iter(self._lines)
        timeout = aiohttp.ClientTimeout(total=600)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:

            async def client() -> None:
                for line in waiting:
                    async with http.post(self._url + line["url"], json=line["body"]) as answer:
                        assert answer.status == 200, await answer.text()
                        await answer.read()

            began = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(AT_ONCE)))
        return len(self._lines) / (time.perf_counter() - began)


class _World:
    """A bundle as `served` wants it."""

    def __init__(self, many: Many) -> None:
        self._many = many

    def config(self, work: Path, **sections: dict[str, Any]) -> Any:
        return self._many.config(work, SLOTS, **sections)


class Offline:
    """`LLM.generate` on each core, half of the sorted prompts each."""

    name = "LLM.generate"

    def __init__(self, stack: ExitStack, many: Many, here: Path, lines: list[Any]) -> None:
        experts = sorted({line["body"]["model"] for line in lines})
        first = set(experts[: len(experts) // 2])
        adapters = {p.name.partition("@")[0]: p for p in _adapter_dirs(many)}
        self._count = len(lines)
        self._children = []
        for core in (0, 1):
            mine = [
                line["body"] for line in lines if (line["body"]["model"] in first) == (core == 0)
            ]
            mine.sort(key=lambda body: body["model"])
            job = [[b["prompt"], str(adapters[b["model"]]), b["max_tokens"]] for b in mine]
            file = here / f"offline-{core}.json"
            file.write_text(json.dumps(job))
            self._children.append(stack.enter_context(_child(core, many, file, here)))
        for child in self._children:
            assert child.stdout
            assert child.stdout.readline().strip() == "ready"

    def turn(self) -> float:
        for child in self._children:
            assert child.stdin
            child.stdin.write("go\n")
            child.stdin.flush()
        return self._count / max(float(c.stdout.readline()) for c in self._children if c.stdout)


def _adapter_dirs(many: Many) -> list[Path]:
    return sorted((many.root / f"adapters-{many.experts}-{many.rank}").iterdir())


@contextmanager
def _child(core: int, many: Many, job: Path, here: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, HERE / "_offline.py", core, SLOTS, many.rank, many.base, job]
    with (here / f"offline-{core}.log").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def compare(report: Report, here: Path, many: Many, count: int, rounds: int) -> None:
    lines = many.lines(count, TOKENS)
    source = here / "in.jsonl"
    write_lines(source, lines)
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        note("  starting six engines …")
        ways = [
            Offline(stack, many, here, lines),
            Own(stack, many, here, source),
            Gateway(stack, many, here, lines),
        ]
        ways[1].turn()  # the engines come up in it
        for turn in range(rounds):
            for way in ways if turn % 2 == 0 else reversed(ways):
                speed = way.turn()
                found.setdefault(way.name, []).append(speed)
                note(f"  {way.name}: {speed:.1f} lines/s")
    middle = {name: statistics.median(speeds) for name, speeds in found.items()}
    suffix = "" if many.rank == 8 else f"_{many.experts}x{many.rank}"
    for name, key in (("batch job", "batch"), ("gateway", "gateway"), ("LLM.generate", "offline")):
        report.add(f"{key}_lines_per_s{suffix}", middle[name], "lines/s")
    ours = found["batch job"]
    for name, key, goal in (
        ("gateway", "over_gateway", ">= 3"),
        ("LLM.generate", "over_offline", ">= 0.95"),
    ):
        ratios = [a / b for a, b in zip(ours, found[name], strict=True)]
        report.add(f"{key}{suffix}", statistics.median(ratios), "", goal)
    say(table(["way", "lines/s"], [[name, speed] for name, speed in middle.items()]))


def route(report: Report, here: Path, seconds: float) -> None:
    """Prompts routed per second by one core, by a router with a student."""
    import numpy as np

    from configs.schema import RouterConfig
    from router.conversation import Message
    from router.distillation import Texts
    from router.embedder import load_embedder
    from router.model import Router

    directory = here / "router-with-student"
    words = [text.split() for text in texts()]
    random_ = random.Random(3)

    def prompt() -> str:
        chosen = random_.choice(words)
        at = random_.randrange(max(1, len(chosen) - 10))
        return " ".join(chosen[at : at + 10])

    if not (directory / "router.json").is_file():
        config = RouterConfig(clusters=10, encoder_layers=0)
        embedder = load_embedder(
            config.embedder, device="cpu", batch_size=256, max_tokens=config.max_tokens
        )

        def with_vectors(some: list[str]) -> Texts:
            vectors = np.asarray(embedder.encode(some))
            return Texts(vectors, lambda rows: [some[row] for row in rows])

        train = [prompt() for _ in range(4000)]
        held = [prompt() for _ in range(1000)]
        learnt, judged = map(with_vectors, (train, held))
        fitted = Router.fit(learnt.vectors, judged.vectors, config, seed=0, embedder=embedder)
        fitted.router.taught(learnt, judged).save(directory)
    router = Router.load(directory, device="cpu", threads=1)
    for sure_only, key, goal in ((False, "fast", ">= 5000"), (True, "cascade", None)):
        done = 0
        router.route_conversations([[Message("user", prompt())]], sure_only=sure_only)
        began = time.process_time()
        while time.process_time() - began < seconds:
            block = [[Message("user", prompt())] for _ in range(512)]
            router.route_conversations(block, sure_only=sure_only)
            done += len(block)
        speed = done / (time.process_time() - began)
        report.add(f"routed_per_s_{key}", speed, "prompts/s per core", goal)


def memory(report: Report, here: Path, count: int) -> None:
    """The largest memory of a job of many lines, and how much it still grew in its second half."""
    source = here / "many.jsonl"
    with source.open("w") as file:
        for number in range(count):
            body = f'{{"model":"expert-{number * 7919 % 32:04}","prompt":"line {number}"}}'
            file.write(
                f'{{"custom_id":"n{number}","method":"POST","url":"/v1/completions",'
                f'"body":{body}}}\n'
            )
    began = time.perf_counter()
    answer = subprocess.run(
        [sys.executable, str(HERE / "_stub_job.py"), str(source), str(here)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    if answer.returncode:
        report.miss("memory_peak_gib", "GiB", f"< {MEMORY_GOAL_GIB}", answer.stderr[-500:])
        return
    found = json.loads(answer.stdout)
    assert found["done"] == count
    report.add("memory_peak_gib", found["peak_gib"], "GiB", f"< {MEMORY_GOAL_GIB}")
    report.add("memory_growth_gib", found["growth_gib"], "GiB", "< 0.2")
    report.add("stub_lines", count, "lines")
    report.add("stub_lines_per_s", count / (time.perf_counter() - began), "lines/s")
    source.unlink()


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--experts", type=int, default=32)
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--lines", type=int, help="of the comparison")
    arguments.add_argument("--only", choices=["speed", "routing", "memory"], action="append")
    options = arguments.parse_args()
    wanted = options.only or ["speed", "routing", "memory"]
    report = Report("batch")
    here = WORK.resolve()
    here.mkdir(parents=True, exist_ok=True)
    if "routing" in wanted:
        route(report, here, 3.0 if options.quick else 10.0)
    if "memory" in wanted:
        memory(report, here, 60_000 if options.quick else 1_000_000)
    if "speed" in wanted:
        many = made_many(here, options.experts, options.rank)
        count, rounds = (512, 1) if options.quick else (1536, 3)
        compare(report, here, many, options.lines or count, rounds)
    report.conditions |= {
        "experts": options.experts,
        "rank": options.rank,
        "slots": SLOTS,
        "tokens": TOKENS,
        "at_once_through_the_gateway": AT_ONCE,
        "engines": "two each, one core each; a random Llama of 4 layers x 256, 4096 tokens",
    }
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
