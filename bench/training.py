"""Training experts here and the usual way, side by side: same rows, same steps, same adapters.

The usual way is a process per expert that loads the base, wraps it in PEFT, runs
`transformers.Trainer` and saves (`bench/_usual_way.py`); it gets its rows packed and tokenized.
Both are measured in every round, in turns, each round with a seed of its own, and the held-out
loss of every adapter is taken afterwards in one place. Ours is timed from the first expert's start
to the last one's end; the start of Ray and of the actors, once a run, has its own figure.

    .venv/bin/python bench/training.py --report runs/bench/training.json
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from _report import Report, parser

from configs.schema import BaseConfig, BundleConfig, DataConfig, ExpertsConfig, RunConfig
from deploy.demo.corpus import build_corpus
from deploy.output import note
from expert_trainer.expert import TrainJob
from expert_trainer.storage import Storage
from expert_trainer.types import Document, ExpertFailed, ExpertStarted, PoolEnded

WORK = Path("runs/bench/training")
USUAL = Path(__file__).with_name("_usual_way.py")
CORES = 2
BASE_TOKENS = {True: 20_000, False: 400_000}
"""Of pre-training, quick or not: a base that knows something makes losses worth comparing."""
HELDOUT_DOCUMENTS = 200
LEAST_NOISE = 0.002
"""Nats per token: noise between seeds is taken to be no smaller."""


@dataclass(frozen=True)
class Corpus:
    """Shards made by hand: what the router would do is not measured here."""

    train: list[list[Document]]
    """Documents of each expert."""
    heldout: list[Document]


@dataclass
class Round:
    """What one seed gave."""

    ours_s: float = 0.0
    start_s: float = 0.0
    one_actor_s: float = 0.0
    computing: float = 0.0
    usual_s: float = 0.0
    """One process after the other, each with all cores."""
    usual_pairs_s: float = 0.0
    """A process per core at a time, each with one."""
    losses: dict[str, list[float]] = field(default_factory=dict)


def arguments() -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--experts", type=int, help="per round; default 8, quick 4")
    options.add_argument("--rounds", type=int, help="seeds; default 3, quick 1")
    options.add_argument("--tokens", type=int, default=80_000, help="of each expert")
    given = options.parse_args()
    given.experts = given.experts or (4 if given.quick else 8)
    given.rounds = given.rounds or (1 if given.quick else 3)
    return given


def make_base(directory: Path, texts: Sequence[str], tokens: int) -> None:
    from expert_trainer.pretraining import SmallLlama, pretrain

    if not directory.is_dir():
        pretrain(texts, directory, shape=SmallLlama(tokens=tokens), seed=0)


def make_corpus(directory: Path, experts: int) -> Corpus:
    """The demo's corpus, dealt out by package, so that shards differ as clusters do."""
    import json

    if not directory.is_dir():
        build_corpus(directory, seed=0)
    rows = [json.loads(line) for line in (directory / "train.jsonl").open()]
    documents = [Document(id=str(row["id"]), text=row["text"]) for row in rows]
    heldout = [
        Document(id=str(row["id"]), text=row["text"])
        for row in map(json.loads, (directory / "valid.jsonl").open())
    ][:HELDOUT_DOCUMENTS]
    ordered = sorted(documents, key=lambda document: document.id)
    size = len(ordered) // experts
    return Corpus([ordered[i * size : (i + 1) * size] for i in range(experts)], heldout)


def run_config(options: argparse.Namespace, base: Path, actors: int) -> RunConfig:
    return RunConfig(
        bundle=BundleConfig(path=str(WORK / "bundle")),
        base=BaseConfig(model=str(base), name="bench", dtype="float32"),
        data=DataConfig(train=["none"]),
        experts=ExpertsConfig(
            rank=8,
            alpha=16,
            sequence_length=256,
            batch_rows=2,
            tokens_per_expert=options.tokens,
            learning_rate=5e-3,
            patience=0,
            actors=actors,
        ),
    )


def make_jobs(config: RunConfig, corpus: Corpus, root: Path, seed: int) -> list[TrainJob]:
    from expert_trainer.base import base_digest, tokenizer_digest
    from expert_trainer.schedule import steps_for
    from expert_trainer.shards import write_shard

    storage = Storage(root.absolute())
    heldout = write_shard(storage, "heldout.jsonl", corpus.heldout)
    digests = base_digest(config.base), tokenizer_digest(config.base)
    return [
        TrainJob(
            id=f"expert-{number:04d}",
            shards=(write_shard(storage, f"cluster-{number:04d}.jsonl", documents),),
            heldout=(heldout,),
            heldout_limit=4_096,
            steps=steps_for(config.experts.tokens_per_expert or 0, config.experts),
            learning_rate=config.experts.learning_rate,
            seed=1000 * seed + number,
            experts=config.experts,
            base_digest=digests[0],
            tokenizer_digest=digests[1],
            dtype=config.base.dtype,
            root=storage / "experts",
        )
        for number, documents in enumerate(corpus.train)
    ]


def train_ours(config: RunConfig, jobs: list[TrainJob]) -> dict[str, float]:
    """Seconds of the experts and of the start, and the share of the time spent computing."""
    from expert_trainer.training import run_experts

    moments: dict[str, float] = {}
    ended: list[PoolEnded] = []

    def listen(event: Any) -> None:
        if isinstance(event, ExpertStarted):
            moments.setdefault("first", time.monotonic())
        if isinstance(event, PoolEnded):
            ended.append(event)

    begin = time.monotonic()
    for event in run_experts(config, jobs, Storage(WORK.absolute() / "checkpoints"), listen):
        if isinstance(event, ExpertFailed):
            raise SystemExit(f"{event.id} failed: {event.cause}")
        moments["last"] = time.monotonic()
    return {
        "start": moments["first"] - begin,
        "experts": moments["last"] - moments["first"],
        "computing": ended[-1].computing / ended[-1].seconds,
    }


def export_rows(config: RunConfig, job: TrainJob, path: Path) -> None:
    """The very rows that the job trains on, as the usual way takes them."""
    from expert_trainer.base import load_tokenizer
    from expert_trainer.packing import IGNORED, collate, endless_rows
    from expert_trainer.rendering import Renderer

    experts = config.experts
    renderer = Renderer(load_tokenizer(config.base))
    examples = [renderer.render(d) for shard in job.shards for d in shard.documents()]
    rows = endless_rows(examples, experts.sequence_length, job.seed)
    count = job.steps * experts.batch_rows
    batch = collate(list(islice(rows, count)), experts.sequence_length, "cpu")
    labels = np.full(tuple(batch.labels.shape), -100)  # transformers shifts them by itself
    wanted = batch.owners.numpy()[:, :-1] != IGNORED
    labels[:, 1:] = np.where(wanted, batch.labels.numpy()[:, :-1], -100)
    np.savez(
        path,
        input_ids=batch.input_ids.numpy(),
        position_ids=batch.position_ids.numpy(),
        labels=labels,
    )


def usual_command(config: RunConfig, job: TrainJob, rows: Path, out: Path, threads: int) -> list:
    experts = config.experts
    return [
        *(sys.executable, USUAL, config.base.model, rows, out),
        *("--rank", str(experts.rank), "--alpha", f"{experts.alpha:g}"),
        *("--learning-rate", f"{job.learning_rate:g}", "--batch", str(experts.batch_rows)),
        *("--warmup-share", f"{experts.warmup_share:g}"),
        *("--seed", str(job.seed), "--threads", str(threads)),
    ]


def train_usual(
    config: RunConfig, jobs: list[TrainJob], rows: list[Path], root: Path, at_once: int
) -> float:
    """Seconds of all experts, `at_once` processes at a time."""
    begin = time.monotonic()
    waiting, running = list(zip(jobs, rows, strict=True)), []
    log = (WORK / "usual.log").open("a")
    while waiting or running:
        while waiting and len(running) < at_once:
            job, data = waiting.pop(0)
            command = usual_command(config, job, data, root / job.id, CORES // at_once)
            running.append(subprocess.Popen(list(map(str, command)), stdout=log, stderr=log))
        time.sleep(0.02)
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode:
                raise SystemExit(f"the usual way failed; see {WORK / 'usual.log'}")
    return time.monotonic() - begin


def heldout_losses(config: RunConfig, corpus: Corpus, directories: list[Path]) -> list[float]:
    from expert_trainer.measure import document_losses, mean_loss
    from expert_trainer.workbench import Workbench

    bench = Workbench(config)
    from expert_trainer.rendering import Renderer

    renderer = Renderer(bench.base.tokenizer)
    examples = [renderer.render(document) for document in corpus.heldout]
    losses = []
    for directory in directories:
        bench.adapter.load(0, directory)
        with bench.adapter.using([0]):
            loss = mean_loss(document_losses(bench.model, examples, 256, 8))
        assert loss is not None, "there is held-out text"
        losses.append(loss)
    return losses


def one_round(options: argparse.Namespace, base: Path, corpus: Corpus, seed: int) -> Round:
    from expert_trainer.runtime import ray_session

    result = Round()
    root = WORK / f"seed-{seed}"
    shutil.rmtree(root, ignore_errors=True)
    config = run_config(options, base, CORES)
    jobs = make_jobs(config, corpus, root / "two", seed)
    rows = [root / f"{job.id}.npz" for job in jobs]
    for job, path in zip(jobs, rows, strict=True):
        export_rows(config, job, path)
    note(f"seed {seed}: {len(jobs)} experts of {jobs[0].steps} steps …")
    with ray_session(cpus=CORES):
        ours = train_ours(config, jobs)
    result.ours_s, result.start_s = ours["experts"], ours["start"]
    result.computing = ours["computing"]
    note(f"  ours {result.ours_s:.1f} s")
    few = slice(0, 2) if options.quick else slice(None)
    usual = train_usual(config, jobs[few], rows[few], root / "usual", 1)
    result.usual_s = usual * len(jobs) / len(jobs[few])
    note(f"  the usual way {result.usual_s:.1f} s")
    pairs = train_usual(config, jobs[few], rows[few], root / "usual-pairs", CORES)
    result.usual_pairs_s = pairs * len(jobs) / len(jobs[few])
    note(f"  the usual way, {CORES} at once {result.usual_pairs_s:.1f} s")
    single = run_config(options, base, 1)
    alone = make_jobs(single, corpus, root / "one", seed)
    with ray_session(cpus=CORES):
        result.one_actor_s = train_ours(single, alone)["experts"]
    note(f"  one actor {result.one_actor_s:.1f} s")
    result.losses["ours"] = heldout_losses(
        config, corpus, [root / "two" / "experts" / job.id for job in jobs[few]]
    )
    result.losses["usual"] = heldout_losses(
        config, corpus, [root / "usual" / job.id for job in jobs[few]]
    )
    return result


def noise(rounds: Sequence[Round]) -> float:
    """Standard deviation of the difference between the two ways over seeds and experts."""
    spreads = []
    for way in ("ours", "usual"):
        by_expert = zip(*(each.losses[way] for each in rounds), strict=True)
        spreads += [statistics.stdev(losses) for losses in by_expert if len(losses) > 1]
    return max(LEAST_NOISE, statistics.fmean(spreads) if spreads else LEAST_NOISE)


def main() -> int:
    options = arguments()
    random.seed(0)
    WORK.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(WORK / "corpus", options.experts)
    texts = [document.text for shard in corpus.train for document in shard]
    base = (WORK / f"base-{BASE_TOKENS[options.quick]}").absolute()
    make_base(base, texts, BASE_TOKENS[options.quick])
    rounds = [one_round(options, base, corpus, seed) for seed in range(options.rounds)]

    def middle(name: str) -> float:
        return statistics.median(getattr(each, name) for each in rounds)

    report = Report(
        "training",
        conditions={
            "experts": options.experts,
            "seeds": options.rounds,
            "tokens_per_expert": options.tokens,
            "cores": CORES,
            "base": "Llama of 2.6 M parameters, float32",
        },
    )
    hour = 3600 * options.experts
    report.add("experts_per_hour", hour / middle("ours_s"), "1/h")
    report.add("experts_per_hour_usual", hour / middle("usual_s"), "1/h")
    report.add("experts_per_hour_usual_pairs", hour / middle("usual_pairs_s"), "1/h")
    ratios = [each.usual_s / each.ours_s for each in rounds]
    report.add("times_the_usual_way", statistics.median(ratios), "x", ">= 5")
    ratios = [each.usual_pairs_s / each.ours_s for each in rounds]
    report.add("times_the_usual_way_pairs", statistics.median(ratios), "x")
    ratios = [each.usual_s / (each.ours_s + each.start_s) for each in rounds]
    report.add("times_the_usual_way_with_start", statistics.median(ratios), "x")
    report.add("start_seconds", middle("start_s"), "s")
    report.add("computing_percent", 100 * middle("computing"), "%", ">= 90")
    ratios = [each.one_actor_s / each.ours_s for each in rounds]
    report.add("two_actors_over_one", statistics.median(ratios), "x", ">= 1.85")
    means = {
        way: statistics.fmean(loss for each in rounds for loss in each.losses[way])
        for way in ("ours", "usual")
    }
    report.add("heldout_loss", means["ours"], "nats")
    report.add("heldout_loss_usual", means["usual"], "nats")
    if len(rounds) > 1:  # one seed says nothing of noise
        gap = abs(means["ours"] - means["usual"]) / noise(rounds)
        report.add("heldout_gap_in_deviations", gap, "sd", "<= 1")
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
