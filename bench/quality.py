"""The proof, first version: routed experts, the base, a random expert and one LoRA of equal tokens.

Pre-trains a small base on the corpus, fits the router, trains every expert, from scratch and from a
shared adapter within the same total of tokens, and the single LoRA over its grid of learning rates,
and evaluates all of them on held-out text. Without paths it takes the demo's corpus. What is
finished is reused when it runs again; `--quick` shrinks the budgets and keeps its results apart.

    .venv/bin/python bench/quality.py --train corpus.train.jsonl --valid corpus.valid.jsonl \\
        --test corpus.test.jsonl --report runs/bench/quality.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

from _report import Report, parser

from configs.schema import (
    BaseConfig,
    BundleConfig,
    DataConfig,
    ExpertsConfig,
    RouterConfig,
    RunConfig,
)
from deploy.demo.corpus import build_corpus
from deploy.output import note
from deploy.progress import StageBar
from deploy.training_view import TrainingView
from expert_trainer.pretraining import SmallLlama, pretrain

WORK = Path("runs/bench/quality")
SPLITS = ("train", "valid", "test")


def arguments() -> argparse.Namespace:
    options = parser(__doc__ or "")
    for split in SPLITS:
        options.add_argument(f"--{split}", metavar="FILE", help=f"JSONL of the {split} split")
    options.add_argument("--clusters", type=int, default=6)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--base-tokens", type=int, default=2_400_000)
    options.add_argument("--expert-tokens", type=int, default=150_000, help="of each expert")
    options.add_argument("--learning-rate", type=float, default=5e-3)
    options.add_argument("--grid", type=float, nargs="+", default=[1.25e-3, 2.5e-3, 5e-3])
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


def corpus(options: argparse.Namespace, work: Path) -> dict[str, str]:
    given = {split: getattr(options, split) for split in SPLITS}
    if all(given.values()):
        return given
    directory = work / "corpus"
    if not directory.is_dir():
        build_corpus(directory, seed=options.seed)
    return {split: str(directory / f"{split}.jsonl") for split in SPLITS}


def run_config(options: argparse.Namespace, files: dict[str, str], work: Path) -> RunConfig:
    return RunConfig(
        seed=options.seed,
        bundle=BundleConfig(path=str(work / "scratch")),
        base=BaseConfig(model=str(base_directory(options, files)), name="base", dtype="float32"),
        data=DataConfig(**{split: [path] for split, path in files.items()}),
        router=RouterConfig(clusters=options.clusters, max_tokens=64),
        experts=ExpertsConfig(
            rank=options.rank,
            alpha=2 * options.rank,
            sequence_length=256,
            batch_rows=2,
            tokens_per_expert=options.expert_tokens,
            learning_rate=options.learning_rate,
            baseline_learning_rates=options.grid,
        ),
    )


def base_directory(options: argparse.Namespace, files: dict[str, str]) -> Path:
    """The base of this corpus, budget and seed, whatever else is measured on it."""
    text = Path(files["train"]).read_bytes()
    key = hashlib.sha256(text + f"{options.base_tokens} {options.seed}".encode()).hexdigest()[:8]
    return (WORK / f"base-{key}").absolute()


def warm(config: RunConfig, work: Path) -> RunConfig:
    """The same run from a shared adapter, on the fit that is there."""
    bundle = BundleConfig(path=str(work / "shared"))
    if not Path(bundle.work).is_dir():
        for name in ("router", "shards"):
            shutil.copytree(Path(config.bundle.work) / name, Path(bundle.work) / name)
        shutil.copy(Path(config.bundle.work) / "fit.json", bundle.work)
    experts = config.experts.model_copy(update={"init": "shared"})
    return config.model_copy(update={"bundle": bundle, "experts": experts})


def make_base(config: RunConfig, tokens: int) -> float:
    """Pre-train the base on the training split unless it is there; seconds it took."""
    started = time.monotonic()
    directory = Path(config.base.model)
    if not directory.is_dir():
        with Path(config.data.train[0]).open() as lines:
            texts = [json.loads(line)["text"] for line in lines]
        with StageBar() as bar:
            pretrain(
                texts,
                directory,
                shape=SmallLlama(tokens=tokens),
                seed=config.seed,
                on_progress=lambda step, steps, _: bar("pre-training", step, steps),
            )
    return time.monotonic() - started


def main() -> int:
    from expert_trainer.evaluation import evaluate
    from expert_trainer.fitting import ensure_fit
    from expert_trainer.runtime import ray_session
    from expert_trainer.training import train

    options = arguments()
    if options.quick:
        options.base_tokens, options.expert_tokens = 250_000, 16_000
    settings = {name: value for name, value in vars(options).items() if name != "report"}
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
    work = WORK / key
    work.mkdir(parents=True, exist_ok=True)
    files = corpus(options, work)
    config = run_config(options, files, work)
    report = Report("quality", conditions={**settings, "work": key})
    report.add("base_seconds", make_base(config, options.base_tokens), "s")
    started = time.monotonic()
    with StageBar() as bar:
        ensure_fit(config, bar)
    report.add("fit_seconds", time.monotonic() - started, "s")
    with ray_session():
        started = time.monotonic()
        with TrainingView() as view:
            train(config, on_event=view)
        report.add("experts_seconds", time.monotonic() - started, "s")
        with TrainingView() as view:
            train(warm(config, work), on_event=view)
        started = time.monotonic()
        note("evaluating …")
        with TrainingView() as view:
            result = evaluate(config, on_event=view)
        with TrainingView() as view:
            warmed = evaluate(warm(config, work), on_event=view, baseline=False)
        report.add("evaluation_seconds", time.monotonic() - started, "s")
    total = result.overall
    report.add("perplexity_base", total.base, "")
    report.add("perplexity_routed", total.routed, "", f"< {total.base:.6f}")
    report.add("perplexity_random", total.random, "", f"> {total.routed:.6f}")
    report.add("perplexity_hindsight", total.hindsight, "")
    report.add("perplexity_routed_shared_init", warmed.overall.routed, "")
    report.add("shared_init_over_scratch", warmed.overall.routed / total.routed, "")
    if result.student is not None:
        report.add("student_answered", result.student.documents / total.documents, "")
        report.add("student_agreement", result.student.agreement, "")
        report.add("student_regret", result.student.regret, "nats/token")
    if total.single is not None:
        report.add("perplexity_single", total.single, "")
        report.add("routed_over_single", total.routed / total.single, "")
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
