"""`introvert train`: shards to a published bundle."""

from __future__ import annotations

import argparse

from configs import ConfigError, load_config
from deploy.output import check_report, note, results, say, write_report
from deploy.progress import StageBar
from deploy.tensorboard import TensorBoard, run_directory
from deploy.training_report import describe
from deploy.training_view import TrainingView
from expert_trainer.types import ExpertFinished, TrainEvent


def run(options: argparse.Namespace) -> int:
    """One JSON line, its card, for each expert as it finishes; 1 if any expert failed.

    The lines are left out where they would land on a terminal.
    """
    from expert_trainer.fitting import ensure_fit
    from expert_trainer.places import run_lock
    from expert_trainer.training import train

    if options.only and options.add_data:
        problem = "--only and --add-data each choose the experts to train; give one of them"
        raise ConfigError("introvert train", [problem])
    config = load_config(options.config, options.overrides)
    check_report(options.report)
    with run_lock(config.bundle):
        with StageBar() as stages:
            fit = ensure_fit(config, stages)
        with TensorBoard(run_directory(config.bundle.scratch)) as board, TrainingView() as view:

            def listen(event: TrainEvent) -> None:
                view(event)
                board(event)
                # for programs; a person has the view and the table at the end
                if isinstance(event, ExpertFinished) and not results().isatty():
                    say(event.card.model_dump_json())

            summary = train(config, listen, only=options.only, add_data=options.add_data, fit=fit)
    note(describe(summary, list(view.state.cards.values()), view.state))
    note(f"bundle {summary.version} in {summary.bundle}")
    write_report(options.report, summary.model_dump(mode="json"))
    return 1 if summary.failed else 0
