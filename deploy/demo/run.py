"""The demo, stage by stage; what is finished is reused when it runs again."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from deploy.demo.answers import Answer, ask_all
from deploy.demo.corpus import PACKAGES, build_corpus
from deploy.demo.stages import Stages, digest
from deploy.lifetime import until_stopped
from deploy.output import note, say, table, write_report
from deploy.progress import StageBar
from deploy.training_view import TrainingView
from expert_trainer.pretraining import SmallLlama, pretrain
from server.cluster import Cluster, check_port
from server.topology import plan_workers

TERMS_SHOWN = 5
EXCERPT = 100


def run_demo(config: RunConfig, *, once: bool, report: str | None) -> int:
    """Corpus, base, router, experts, evaluation, cluster, questions; 0 when all went well.

    Args:
        config: the `demo` preset, overrides applied; its base and data are made here.
        once: stop after the questions instead of staying up.
        report: file for everything as JSON.
    """
    from expert_trainer.evaluation import Evaluation
    from expert_trainer.runtime import ray_session
    from server.control.staff import list_nodes

    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    check_port(config)  # now, not after ten minutes of training
    stages = Stages(Path(config.base.model).parent)
    corpus_key = _make_corpus(config, stages)
    _make_base(config, stages, corpus_key)
    with ray_session():
        plan_workers(list_nodes(), config.serving)  # now as well
        failed = _train(config, stages)
        evaluation = Evaluation.model_validate(_evaluate(config, stages))
    with contextlib.ExitStack() as serving:
        with stages.timed("cluster"):
            cluster = serving.enter_context(Cluster(config))
            cluster.wait_ready(config.serving.startup_timeout_s)
        experts = _experts(config, evaluation, cluster)
        _say_experts(experts, evaluation)
        with stages.timed("questions"):
            answers = [_say_answer(answer) for answer in ask_all(cluster.url)]
        engines = sorted({worker.engine for worker in cluster.table.workers})
        write_report(report, _report(stages, evaluation, experts, answers, engines))
        say(f"\nready: {cluster.url}/v1")
        if not once:
            say(_invitation(cluster.url, config))
            until_stopped()
        note("stopping …")
    return 1 if failed else 0


def _make_corpus(config: RunConfig, stages: Stages) -> str:
    directory = Path(config.data.train[0]).parent
    key = digest(config.seed, {name: _version(name) for name in PACKAGES})
    made = stages.once(
        "corpus",
        key,
        [directory],
        lambda: asdict(build_corpus(directory, seed=config.seed)),
    )
    note(
        f"  {made['documents']:,} documents, {made['characters'] / 1e6:.1f} MB, from the "
        f"documentation of {', '.join(made['packages'])}"
    )
    return key


def _version(package: str) -> str:
    """Version of the distribution that brings an import package."""
    return version({"sklearn": "scikit-learn", "PIL": "pillow"}.get(package, package))


def _make_base(config: RunConfig, stages: Stages, corpus_key: str) -> None:
    directory, shape = Path(config.base.model), SmallLlama()

    def make() -> dict[str, Any]:
        with Path(config.data.train[0]).open(encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        with StageBar() as bar:

            def show(step: int, steps: int, loss: float) -> None:
                bar("pre-training", step, steps)
                bar.detail("pre-training", f"loss {loss:.2f}")

            return asdict(
                pretrain(texts, directory, shape=shape, seed=config.seed, on_progress=show)
            )

    made = stages.once("base", digest(corpus_key, asdict(shape), config.seed), [directory], make)
    note(
        f"  a Llama of {made['parameters'] / 1e6:.1f} M parameters, {made['tokens']:,} tokens "
        f"of pre-training, loss {made['final_loss']:.2f}"
    )


def _train(config: RunConfig, stages: Stages) -> bool:
    """Fit and train; whether any expert failed."""
    from expert_trainer.fitting import ensure_fit
    from expert_trainer.training import train

    with stages.timed("router"), StageBar() as stage_bar:
        fit = ensure_fit(config, stage_bar)
        note(f"  {fit.documents:,} documents in {len(fit.clusters)} clusters")
    with stages.timed("experts"), TrainingView() as view:
        summary = train(config, view, fit=fit)
    note(
        f"  bundle {summary.version}: {len(summary.admitted)} experts admitted, "
        f"{len(summary.held_back)} held back"
    )
    for failure in summary.failed:
        note(f"  {failure.id} failed: {failure.cause}")
    return bool(summary.failed)


def _evaluate(config: RunConfig, stages: Stages) -> dict[str, Any]:
    from expert_trainer.bundle import open_bundle
    from expert_trainer.evaluation import evaluate

    def make() -> dict[str, Any]:
        with TrainingView("evaluation") as view:
            return evaluate(config, view, baseline=False).model_dump(mode="json")

    bundle = open_bundle(config.bundle.path, verify=False).manifest.version
    tests = [Path(path).read_text(encoding="utf-8") for path in config.data.test]
    return stages.once("evaluation", digest(bundle, tests, config.seed), [], make)


def _experts(config: RunConfig, evaluation: Any, cluster: Cluster) -> list[dict[str, Any]]:
    """A row for each expert of the bundle, served or not."""
    from expert_trainer.bundle import open_bundle

    bundle = open_bundle(config.bundle.path, verify=False)
    homes = {home.id: home.workers for home in cluster.table.experts}
    arms = {each.expert: each.arms for each in evaluation.clusters}
    rows = []
    for entry in bundle.manifest.experts:
        card, figures = bundle.card(entry), arms.get(entry.id)
        rows.append(
            {
                "id": entry.id,
                "version": entry.version,
                "state": entry.state,
                "cluster": entry.cluster,
                "top_terms": card.top_terms,
                "documents": card.documents,
                "tokens": card.tokens,
                "tokens_seen": card.tokens_seen,
                "perplexities": {
                    "base": figures.base if figures else None,
                    "own": figures.routed if figures else None,
                    "random": figures.random if figures else None,
                },
                "worker": homes.get(entry.id, [None])[0],
            }
        )
    return rows


def _say_experts(experts: list[dict[str, Any]], evaluation: Any) -> None:
    rows = [
        [
            expert["id"],
            " ".join(expert["top_terms"][:TERMS_SHOWN]),
            expert["tokens"],
            *expert["perplexities"].values(),
            expert["worker"] or expert["state"],
        ]
        for expert in experts
    ]
    total, tokens = evaluation.overall, sum(expert["tokens"] for expert in experts)
    rows.append(["all", "", tokens, total.base, total.routed, total.random, ""])
    headers = ["expert", "top terms", "tokens", "base", "own expert", "random expert", "worker"]
    say("\nperplexity on held-out text\n")
    say(table(headers, rows))
    say("")


def _say_answer(answer: Answer) -> dict[str, Any]:
    text = " ".join(answer.text.split())
    excerpt = text if len(text) <= EXCERPT else text[:EXCERPT].rsplit(" ", 1)[0] + " …"
    say(f"\n? {answer.question}")
    say(
        f"  {answer.expert} on {answer.worker}, score {answer.score:.2f}, routed in "
        f"{answer.route_ms:.0f} ms, answered in {answer.seconds * 1000:.0f} ms"
    )
    say(f"  {excerpt}")
    return asdict(answer)


def _report(
    stages: Stages,
    evaluation: Any,
    experts: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    engines: list[str],
) -> dict[str, Any]:
    total = evaluation.overall
    name, _, engine_version = (engines[0] if engines else "").partition(" ")
    return {
        "experts": experts,
        "perplexity": {
            "base": total.base,
            "routed": total.routed,
            "random": total.random,
            "hindsight": total.hindsight,
        },
        "headroom_closed_percent": evaluation.headroom_closed,
        "engine": {"name": name, "version": engine_version},
        "answers": answers,
        "seconds": stages.seconds,
        "reused": stages.reused,
    }


def _invitation(url: str, config: RunConfig) -> str:
    body = json.dumps({"model": "introvert", "prompt": "A graph is", "max_tokens": 20})
    return (
        f"  models: introvert (by meaning), expert-0000 …, {config.base.served_name}\n"
        f"  curl {url}/v1/completions -H 'content-type: application/json' -d '{body}'\n"
        f"  introvert status --url {url}\n"
        "Ctrl-C ends it."
    )
