"""`introvert demo`: everything, offline, in front of you."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from configs import ConfigError, load_config
from deploy.output import check_report


def run(options: argparse.Namespace) -> int:
    """Corpus, base, router, experts, evaluation, cluster, questions."""
    refuse_own_data(options.overrides)
    config = load_config(options.config, options.overrides)
    check_report(options.report)
    from deploy.demo.run import run_demo

    return run_demo(config, once=options.once, report=options.report)


def refuse_own_data(overrides: Sequence[str]) -> None:
    """The demo makes its base and corpus, replacing what is there: never a path of the user's.

    Raises:
        ConfigError: an override of `base.model` or of the data.
    """
    taken = [item for item in overrides if item.strip().startswith(("base", "data"))]
    if taken:
        raise ConfigError(
            "introvert demo",
            [
                f"--set {item}: the demo makes its own base and data; to use yours, write a config "
                "and run `introvert train CONFIG`"
                for item in taken
            ],
        )
