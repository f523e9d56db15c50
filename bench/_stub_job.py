"""A batch job with an engine that is a stub: `python _stub_job.py INPUT DIRECTORY`.

Prints the process' largest memory and how much it grew after a quarter of the lines, as JSON. The
engine is a child process, whose memory is not counted.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import shutil
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aiohttp import web

# This file's folder would hide the package of the same name as one of its files.
sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

from configs.manifest import expert_id  # noqa: E402
from server.batch.job import run_job  # noqa: E402
from server.batch.own import OwnBackend  # noqa: E402
from server.batch.types import Counts, JobSpec  # noqa: E402
from server.engine_host import LINES_PATH  # noqa: E402
from server.table import RoutingTable, WorkerEntry  # noqa: E402

EXPERTS = 32
VERSION = "stub"
ANSWER = b'{"choices":[{"index":0,"text":"' + b"a constant answer " * 8 + b'"}],"usage":{}}'


def engine(pipe: Connection) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        lines = (await request.read()).split(b"\n")
        ids = [line[6 : line.index(b",")] for line in lines]
        body = b"".join(b'{"id":%s,"status":200,"body":%s}\n' % (i, ANSWER) for i in ids)
        await response.write(body)
        return response

    async def serve() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post(LINES_PATH, answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server
        pipe.send(site._server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(serve())


def manifest() -> Any:
    served = [SimpleNamespace(id=expert_id(n), version=VERSION) for n in range(EXPERTS)]
    return SimpleNamespace(base=SimpleNamespace(name="base"), served=served)


def table(port: int) -> RoutingTable:
    names = [f"{expert_id(n)}@{VERSION}" for n in range(EXPERTS)]
    worker = WorkerEntry(
        id="worker-0",
        state="ready",
        url=f"http://127.0.0.1:{port}",
        node="127.0.0.1",
        devices="stub",
        engine="stub",
        pid=None,
        experts=names,
        restarts=0,
        detail="",
    )
    return RoutingTable.model_construct(workers=[worker])


def memory_gib() -> float:
    # not what `getrusage` says, which a process inherits from the one that starts it
    status = Path("/proc/self/status").read_text().split("VmHWM:", 1)[1]
    return int(status.split()[0]) / 2**20


class Nobody:
    """A router that is never asked where anything goes."""

    def route_conversations(self, conversations: Any, *, sure_only: bool = True) -> list[Any]:
        assert not conversations
        return []


async def job(source: Path, here: Path, port: int) -> dict[str, float]:
    marks: list[float] = []
    answered: list[float] = []

    def listen(counts: Counts) -> None:
        if not marks and counts.phase == "reading" and counts.total > 10_000:
            marks.append(memory_gib())
        if not answered and counts.done > counts.total / 4:
            answered.append(memory_gib())

    the_table = table(port)
    backend = OwnBackend(
        manifest(),
        Nobody(),
        table=lambda: the_table,
        demand=lambda _: None,
        engine_key="",
    )
    work = here / "stub-ledger"
    shutil.rmtree(work, ignore_errors=True)
    spec = JobSpec((str(source),), str(here / "stub.jsonl"), str(here / "stub.errors.jsonl"), work)
    async with backend:
        counts = await run_job(spec, backend, listen)
    peak = memory_gib()
    before = answered[0] if answered else peak
    return {"done": counts.done, "peak_gib": peak, "growth_gib": peak - before}


def main() -> None:
    source, here = map(Path, sys.argv[1:])
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    stub = context.Process(target=engine, args=(theirs,), daemon=True)
    stub.start()
    try:
        print(json.dumps(asyncio.run(job(source, here, pipe.recv()))))
    finally:
        stub.kill()
        stub.join()


if __name__ == "__main__":
    main()
