"""`introvert fit`: corpus to router and shards."""

from __future__ import annotations

import argparse

from configs import load_config
from deploy.output import check_report, note, say, table, write_report
from deploy.progress import StageBar


def run(options: argparse.Namespace) -> int:
    """A table of the clusters."""
    from expert_trainer.fitting import fit
    from expert_trainer.places import run_lock
    from expert_trainer.storage import Storage

    config = load_config(options.config, options.overrides)
    check_report(options.report)
    with run_lock(config.bundle), StageBar() as bar:
        summary = fit(config, bar)
    rows = [
        [c.cluster, c.documents, c.tokens, c.heldout_documents, " ".join(c.top_terms[:6])]
        for c in summary.clusters
    ]
    say(table(["cluster", "documents", "tokens", "held out", "top terms"], rows))
    say(
        f"\n{summary.documents:,} documents of {summary.rows:,} rows "
        f"({summary.duplicates:,} copies, {summary.near_duplicates:,} near-copies, "
        f"{summary.bad_rows:,} bad rows) in {len(summary.clusters)} clusters: "
        f"{Storage(config.bundle.work)}"
    )
    for fault in summary.faults:
        note(f"bad row: {fault}")
    write_report(options.report, summary.model_dump(mode="json"))
    return 0
