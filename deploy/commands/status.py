"""`introvert status`: what a running endpoint holds, read from its admin route."""

from __future__ import annotations

import argparse
import http.client
import json
import urllib.request
from typing import Any

from configs.errors import IntrovertError
from deploy.output import check_report, say, table, write_report
from server.table import RoutingTable

TIMEOUT_S = 10


class UnreachableError(IntrovertError):
    """No endpoint answers at the URL."""


def run(options: argparse.Namespace) -> int:
    """A table of workers and one of experts; exit code 1 while not every expert is ready."""
    check_report(options.report)
    status = _fetch(options.url.rstrip("/"))
    write_report(options.report, status)
    if status.get("table") is None:
        say("no routing table yet: the workers are starting")
        return 1
    routing = RoutingTable.model_validate(status["table"])
    in_flight = status.get("in_flight", {})
    say(f"bundle {routing.bundle}, base {routing.base_name}, table version {routing.version}\n")
    say(
        table(
            [
                "worker",
                "state",
                "devices",
                "node",
                "engine",
                "experts",
                "in flight",
                "restarts",
                "",
            ],
            [
                [
                    w.id,
                    w.state,
                    w.devices,
                    w.node,
                    w.engine,
                    len(w.experts),
                    in_flight.get(w.id, 0),
                    w.restarts,
                    w.detail,
                ]
                for w in routing.workers
            ],
        )
    )
    rows: list[list[object]] = []
    for expert in routing.experts:
        ready = {worker.id for worker in routing.ready_workers(expert.served_name)}
        missing = [worker for worker in expert.workers if worker not in ready]
        state = "ready" if not missing else "partly ready" if ready else "not ready"
        rows.append([expert.id, expert.version, state, ", ".join(expert.workers)])
    say("\n" + table(["expert", "version", "state", "workers"], rows))
    return 0 if all(row[2] == "ready" for row in rows) else 1


def _fetch(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{url}/admin/status", timeout=TIMEOUT_S) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UnreachableError(
            f"no Introvert endpoint answers at {url} ({reason}); start one with "
            "`introvert serve CONFIG` or give its address with --url"
        ) from None
