"""`introvert evaluate`: what routing to experts is worth on held-out text."""

from __future__ import annotations

import argparse

from configs import load_config
from deploy.output import check_report, say, table, write_report
from deploy.training_view import TrainingView
from expert_trainer.arms import Arms
from expert_trainer.evaluation import Evaluation


def run(options: argparse.Namespace) -> int:
    """Perplexities per cluster and over all held-out text."""
    from expert_trainer.evaluation import evaluate

    config = load_config(options.config, options.overrides)
    check_report(options.report)
    with TrainingView("evaluation") as view:
        result = evaluate(config, view, baseline=not options.no_baseline)
    say(describe(result))
    write_report(options.report, result.model_dump(mode="json"))
    return 0


def describe(result: Evaluation) -> str:
    """The evaluation as text: a table, the headroom, the single adapter's grid."""
    rows = [
        [c.cluster, c.state or "none", *_figures(c.arms), " ".join(c.top_terms[:4])]
        for c in result.clusters
        if c.arms is not None
    ]
    rows.append(["all", "", *_figures(result.overall), ""])
    headers = ["cluster", "state", "documents", "tokens", "base", "routed", "random"]
    headers += ["hindsight", "one LoRA", "top terms"]
    lines = [f"perplexity on the {result.split} split\n", table(headers, rows), ""]
    if result.headroom_closed is not None:
        lines.append(
            f"routing closes {result.headroom_closed:.0f}% of the loss between base and hindsight; "
            f"{result.abstained} documents went to the base"
        )
    if result.student is not None:
        lines.append(
            f"the router's students answered {result.student.documents} documents, "
            f"{result.student.agreement:.1%} as the embedder would; that costs "
            f"{result.student.regret:+.5f} nats per token"
        )
    for attempt in result.single:
        mark = " (chosen)" if attempt.chosen else ""
        loss = "–" if attempt.valid_loss is None else f"{attempt.valid_loss:.4f}"
        lines.append(
            f"one LoRA, learning rate {attempt.learning_rate:g}: validation loss {loss}, "
            f"{attempt.tokens_seen:,} tokens{mark}"
        )
    return "\n".join(lines)


def _figures(arms: Arms) -> list[float | int | None]:
    return [
        arms.documents,
        arms.tokens,
        arms.base,
        arms.routed,
        arms.random,
        arms.hindsight,
        arms.single,
    ]
