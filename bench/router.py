"""The router's cascade: what its students answer, how often as the embedder, what it all costs.

A router with a student is fitted on each of two corpora as `introvert fit` does it, and looked at
with texts that neither the fit nor the choice of the limits has seen: short and hard queries
(CLINC150, fitted on its train split, limits from val, measured on test) and documents of five
domains (`corpus.{train,valid,test}.jsonl`). Disagreements are judged by the embedder that serves.
Times are of one process that is held on one core.

    .venv/bin/python bench/router.py [--quick] [--report FILE] [--data DIR] [--clinc FILE]
        [--only clinc|corpus] [--keep DIR]

Data that is missing is skipped with a word, and its goals then count as missed.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _report import Report, parser

from configs.schema import RouterConfig
from deploy.output import note

# This file would hide the package of the same name, which is imported where it is used.
sys.path.remove(str(Path(__file__).resolve().parent))

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Beside the repository."""
CLUSTERS = {"clinc": 10, "corpus": 6}
GOALS = {"clinc": ">= 0.75", "corpus": ">= 0.90"}
BATCH = 256
EMBEDDED_SINGLY = 300
IN_TURN = 25
"""One query each would have torch's weights drive the other's out of the processor's caches."""
QUICK = 1500
"""Texts to fit on and to measure on in a quick run, which takes CLINC150 alone."""


@dataclass(frozen=True)
class Corpus:
    """Texts to fit on, to choose limits on, and to measure on."""

    key: str
    train: list[str]
    valid: list[str]
    test: list[str]


@dataclass(frozen=True)
class Fitted:
    """A router as a gateway loads it, and what its embedder makes of the test texts."""

    corpus: Corpus
    router: Any
    cosines: npt.NDArray[np.float32]
    """Of the test texts with every centroid, shape (N, K)."""


def read_clinc(path: Path) -> Corpus:
    """CLINC150 by its splits, without what is out of its scope."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    splits = [[row["text"] for row in rows if row["split"] == s] for s in ("train", "val", "test")]
    return Corpus("clinc", *splits)


def read_corpus(directory: Path) -> Corpus:
    """The mixed corpus by its files."""
    splits = []
    for name in ("train", "valid", "test"):
        lines = (directory / f"corpus.{name}.jsonl").read_text(encoding="utf-8").splitlines()
        splits.append([json.loads(line)["text"] for line in lines])
    return Corpus("corpus", *splits)


@contextmanager
def one_core() -> Iterator[None]:
    """Hold this process on one of its cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def fitted(corpus: Corpus, report: Report, kept: Path | None) -> Fitted:
    """The router of a corpus: one that an earlier run kept, or one made now."""
    from router.model import Router

    with ExitStack() as stack:
        if kept is None:
            kept = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = kept / corpus.key
        if not (directory / "router.json").is_file():
            fit(corpus, report, directory)
        router = Router.load(directory, device="cpu", threads=1, runtime="auto")
        size = sum(file.stat().st_size for file in directory.iterdir())
    report.add(f"{corpus.key}_router_mb", size / 1e6, "MB")
    return Fitted(corpus, router, router.embed(corpus.test) @ router.centroids.T)


def fit(corpus: Corpus, report: Report, directory: Path) -> None:
    """Fit, teach and save as `introvert fit` does."""
    from router.distillation import Texts
    from router.embedder import load_embedder
    from router.model import Router

    config = RouterConfig(clusters=CLUSTERS[corpus.key], device="cpu")
    embedder = load_embedder(
        config.embedder, device="cpu", batch_size=config.batch_size, max_tokens=config.max_tokens
    )
    note(f"{corpus.key}: {len(corpus.train)} texts to fit on, {len(corpus.test)} to measure on")
    vectors, heldout = embedder.encode(corpus.train), embedder.encode(corpus.valid)
    plain = Router.fit(vectors, heldout, config, seed=0, embedder=embedder).router

    def texts(of: list[str], rows: npt.NDArray[np.float32]) -> Texts:
        return Texts(rows, lambda wanted: [of[place] for place in wanted])

    train = texts(corpus.train, vectors)
    begin = time.perf_counter()
    others = texts(corpus.valid, heldout)
    taught = plain.quantized(train, others).taught(train, others)
    report.add(f"{corpus.key}_distilling_s", time.perf_counter() - begin, "s")
    taught.save(directory)


def measure_agreement(fitted: Fitted, report: Report) -> None:
    """What the students answer of the test texts, and what their disagreements cost."""
    key, texts = fitted.corpus.key, fitted.corpus.test
    judge(key, fitted, texts, fitted.cosines, report, goal=GOALS[key])
    record = fitted.router.student
    report.conditions[f"{key}_student"] = record.model_dump(exclude={"settings"})
    if fitted.router.encoder is not None:
        record = fitted.router.encoder
        report.conditions[f"{key}_encoder"] = record.model_dump(exclude={"settings"})
    if key != "corpus":
        return
    from router.distillation import cut_pieces

    pieces = cut_pieces(texts, 1000, np.random.default_rng(1))
    cosines = fitted.router.embed(pieces) @ fitted.router.centroids.T
    judge("corpus_pieces", fitted, pieces, cosines, report, goal=None)


def judge(
    key: str,
    fitted: Fitted,
    texts: list[str],
    cosines: npt.NDArray[np.float32],
    report: Report,
    *,
    goal: str | None,
) -> None:
    """Compare the students' answers with the embedder's; abstaining differs from any expert."""
    from router.conversation import Message

    alone = [fitted.router.quick_route([Message("user", text)]) for text in texts]
    report.add(f"{key}_answered_by_first", np.mean([r is not None for r in alone]), "")
    routes = fitted.router.route_conversations([[Message("user", text)] for text in texts])
    places = [place for place, route in enumerate(routes) if route.by == "student"]
    clusters = np.array([routes[place].cluster for place in places], dtype=np.int64)
    found = cosines[places]
    right = (clusters == found.argmax(axis=1)) & (found.max(axis=1) >= fitted.router.threshold)
    regret = found.max(axis=1) - found[np.arange(len(places)), clusters]
    report.add(f"{key}_answered", len(places) / len(texts), "", goal)
    report.add(f"{key}_agreement", right.mean() if places else 0.0, "", goal and ">= 0.99")
    report.add(f"{key}_disagreements", int((~right).sum()), "texts")
    report.add(f"{key}_regret", regret.mean() if places else 0.0, "cosine")
    if (~right).any():
        report.add(f"{key}_regret_of_disagreements", regret[~right].mean(), "cosine")


def measure_embedder(fitted: Fitted, report: Report) -> None:
    """The whole embedder while serving: time of a query on one core, agreement with torch."""
    from router.embedder import load_embedder
    from router.student_training import torch_threads

    router, texts = fitted.router, fitted.corpus.test
    config = RouterConfig()
    torch = load_embedder(
        config.embedder, device="cpu", batch_size=config.batch_size, max_tokens=config.max_tokens
    )
    original = torch.encode(texts) @ router.centroids.T
    same = original.argmax(axis=1) == fitted.cosines.argmax(axis=1)
    report.conditions["embedder"] = type(router.embedder).__name__
    report.conditions["embedder_bits"] = 8 if getattr(router.embedder, "quantized", False) else 32
    report.add("embedder_agreement", same.mean(), "", ">= 0.995")
    # In turns: what a query takes in torch says how fast this machine is today.
    times: dict[str, list[float]] = {"embedder": [], "torch": []}
    with one_core(), torch_threads(1):
        for start in range(0, EMBEDDED_SINGLY, IN_TURN):
            some = [[text] for text in texts[start : start + IN_TURN]]
            times["embedder"] += timed(router.embed, some)
            times["torch"] += timed(torch.encode, some)
    took = {name: 1e3 * statistics.median(some) for name, some in times.items()}
    report.add("torch_ms", took["torch"], "ms")
    report.add("embedder_ms", took["embedder"], "ms", "<= 2.5")
    report.add("torch_over_embedder", took["torch"] / took["embedder"], "")


def measure_student(fitted: Fitted, report: Report) -> None:
    """The students alone: one query, and many at once."""
    texts = fitted.corpus.test
    first, *others = fitted.router._cascade.steps
    with one_core():
        timed(first.student.guess, texts[:100])
        times = timed(first.student.guess, texts)
        report.add("student_ms", 1e3 * statistics.median(times), "ms", "<= 0.1")
        for second in others:
            times = timed(second.student.guess, texts[:EMBEDDED_SINGLY])
            report.add("encoder_ms", 1e3 * statistics.median(times), "ms")
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        per_text = statistics.median(
            took / len(batch)
            for took, batch in zip(timed(first.student.guess_many, batches), batches, strict=True)
        )
        report.add("student_prompts_per_s", 1 / per_text, "prompts/s", ">= 5000")
        some = batches[:4]
        rate = sum(map(len, some)) / sum(timed(fitted.router.route, some))
    report.add("cascade_prompts_per_s", rate, "prompts/s")


async def measure_routing(fitted: Fitted, report: Report) -> None:
    """Distinct queries, one after another, through what the gateway routes with."""
    from server.gateway.routing import LoadedRouter, Routing

    routing = Routing(lambda _: LoadedRouter(fitted.router, "bench"), retry_after_s=1)
    routing.serve({"bench": ""})
    for _ in range(1000):
        if routing.ready("bench"):
            break
        await asyncio.sleep(0.01)
    texts = list(dict.fromkeys(fitted.corpus.test))
    times, by_student = [], 0
    try:
        with one_core():
            for number, text in enumerate(texts):
                request = [{"messages": [{"role": "user", "content": text}]}]
                begin = time.perf_counter()
                (route,) = await routing.route("chat", request)
                if number >= BATCH:  # those before warm it up
                    times.append(1e3 * (time.perf_counter() - begin))
                    by_student += route.by == "student"
    finally:
        routing.close()
    report.add("routing_p50_ms", float(np.quantile(times, 0.5)), "ms", "<= 0.3")
    report.add("routing_p99_ms", float(np.quantile(times, 0.99)), "ms", "<= 3")
    report.add("routing_by_student", by_student / len(times), "")


def timed(function: Any, items: Sequence[Any]) -> list[float]:
    """Seconds that each call takes."""
    times = []
    for item in items:
        begin = time.perf_counter()
        function(item)
        times.append(time.perf_counter() - begin)
    return times


def miss_all(key: str, report: Report, why: str) -> None:
    """Say that a corpus is not there."""
    report.miss(f"{key}_answered", "", GOALS[key], why)
    report.miss(f"{key}_agreement", "", ">= 0.99", why)


def main() -> int:
    """Run it; the exit code says whether every goal was met."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, default=DATA, help="directory of the corpora")
    arguments.add_argument("--clinc", type=Path, help="CLINC150 as JSONL; default: in --data")
    arguments.add_argument("--only", choices=sorted(CLUSTERS), help="one of the corpora")
    arguments.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep routers there, and use those that are there"
    )
    options = arguments.parse_args()
    report = Report("router", conditions={"quick": options.quick})
    sources = {
        "clinc": (read_clinc, options.clinc or options.data / "clinc150.jsonl"),
        "corpus": (read_corpus, options.data),
    }
    timed_on: Fitted | None = None
    for key, (read, place) in sources.items():
        if (options.only or (options.quick and "clinc") or key) != key:
            continue
        try:
            corpus = read(place)
        except FileNotFoundError as error:
            miss_all(key, report, f"{error.filename} is missing; name it by --data or --clinc")
            continue
        if options.quick:
            corpus = Corpus(key, corpus.train[:QUICK], corpus.valid, corpus.test[:QUICK])
        found = fitted(corpus, report, options.keep)
        measure_agreement(found, report)
        timed_on = timed_on or found
    if timed_on is not None:
        report.conditions["times_of"] = timed_on.corpus.key
        measure_embedder(timed_on, report)
        measure_student(timed_on, report)
        asyncio.run(measure_routing(timed_on, report))
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
