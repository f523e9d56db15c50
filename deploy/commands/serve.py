"""`introvert serve`: workers and gateway up, until Ctrl-C or SIGTERM takes them down."""

from __future__ import annotations

import argparse

from configs import load_config
from deploy.output import check_report, note, say, write_report


def run(options: argparse.Namespace) -> int:
    """Serve the published bundle; 0 when ended by Ctrl-C or SIGTERM after it was ready."""
    from deploy.lifetime import until_stopped
    from server.cluster import Cluster

    config = load_config(options.config, options.overrides)
    check_report(options.report)
    note("starting workers and gateway …")
    with Cluster(config) as cluster:
        cluster.wait_ready(config.serving.startup_timeout_s)
        write_report(options.report, {"url": cluster.url, "table": cluster.table.model_dump()})
        table = cluster.table
        ready = sum(bool(table.ready_workers(home.served_name)) for home in table.experts)
        for worker in table.workers:
            if worker.detail:
                note(f"  {worker.id}: {worker.detail}")
        say(f"ready: {cluster.url}/v1  ({ready} of {len(table.experts)} experts; Ctrl-C ends it)")
        until_stopped()
        note("stopping …")
    return 0
