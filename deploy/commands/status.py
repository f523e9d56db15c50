"""`introvert status`: what a running endpoint holds, read from its admin route."""

from __future__ import annotations

import argparse
import textwrap
from collections import defaultdict
from typing import Any

from deploy.endpoint import Endpoint
from deploy.output import check_report, say, table, write_report
from server.table import RoutingTable

WIDTH = 98
"""Columns of the notes under the tables."""
SHOWN = 60
"""Experts that are shown at the most, the busiest; and all that are not ready."""
PREFERRED = 3
"""Homes of an expert that are named; of more, how many."""


def run(options: argparse.Namespace) -> int:
    """Tables of workers, experts and gateway processes; exit code 1 while not all is ready."""
    check_report(options.report)
    status = Endpoint.of(options).call("GET", "/admin/status")
    write_report(options.report, status)
    if status.get("table") is None:
        say("no routing table yet: the workers are starting")
        return 1
    routing = RoutingTable.model_validate(status["table"])
    engines = sorted({worker.engine for worker in routing.workers if worker.engine})
    say(
        f"bundle {routing.bundle}, base {routing.base_name}, table version {routing.version}, "
        f"router {status['router']['state']}, {', '.join(engines) or 'no engine yet'}"
    )
    if detail := status["router"]["detail"]:
        say(_note("router", detail))
    if change := status.get("change"):
        say(_change(change))
    say("\n" + _workers(routing, status))
    for worker in routing.workers:
        if worker.detail:
            say(_note(worker.id, worker.detail))
    states = _states(routing)
    say("\n" + _experts(routing, status, states))
    say("\n" + _processes(status))
    missing = status.get("processes_expected", 1) - len(status.get("processes", []))
    if missing > 0:
        say(_note("gateway", f"{missing} of its processes do not answer"))
    return 0 if all(state == "ready" for state in states.values()) else 1


def _workers(routing: RoutingTable, status: dict[str, Any]) -> str:
    in_flight, queued = status.get("in_flight", {}), status.get("queued", {})
    headers = ["worker", "state", "devices", "node", "experts", "slots"]
    return table(
        [*headers, "in flight", "queued", "restarts"],
        [
            [
                worker.id,
                worker.state,
                worker.devices,
                worker.node,
                len(worker.experts),
                worker.slots,
                in_flight.get(worker.id, 0),
                queued.get(worker.id, 0),
                worker.restarts,
            ]
            for worker in routing.workers
        ],
    )


def _experts(routing: RoutingTable, status: dict[str, Any], states: dict[str, str]) -> str:
    requests, cold = status.get("requests", {}), status.get("cold_loads", {})
    shown = routing.experts
    if len(shown) > SHOWN:  # what is amiss, and who is busy
        busiest = sorted(shown, key=lambda home: -requests.get(home.id, 0))[:SHOWN]
        busy = {home.id for home in busiest}
        shown = [home for home in shown if home.id in busy or states[home.id] != "ready"]
    rows: list[list[object]] = [
        [
            home.id,
            home.version,
            states[home.id],
            _homes(home.workers),
            requests.get(home.id, 0),
            cold.get(home.id, 0),
        ]
        for home in shown
    ]
    rows.append(["base", "", "", "all", requests.get("base", 0), None])
    text = table(["expert", "version", "state", "homes", "requests", "cold loads"], rows)
    if hidden := len(routing.experts) - len(shown):
        text += f"\n  and {hidden:,} more, all ready; --report FILE has everything"
    return text


def _processes(status: dict[str, Any]) -> str:
    return table(
        ["gateway", "pid", "since (UTC)", "table", "in flight"],
        [
            [
                str(one["process"]),
                str(one["pid"]),
                one["started"].partition("+")[0].replace("T", " "),
                one["table_version"],
                one["in_flight"],
            ]
            for one in status.get("processes", [])
        ],
    )


def _states(routing: RoutingTable) -> dict[str, str]:
    """Of every expert: whether all, some or none of its homes can answer."""
    holding: dict[str, set[str]] = defaultdict(set)
    for worker in routing.ready_workers(None):
        for name in worker.experts:
            holding[name].add(worker.id)
    states = {}
    for home in routing.experts:
        ready = holding[home.served_name]
        whole = ready and ready.issuperset(home.workers)
        states[home.id] = "ready" if whole else "partly ready" if ready else "not ready"
    return states


def _homes(workers: list[str]) -> str:
    more = len(workers) - PREFERRED
    return ", ".join(workers[:PREFERRED]) + (f" and {more} more" if more > 0 else "")


def _change(change: dict[str, Any]) -> str:
    share = change.get("share")
    trial = f", {share:.0%} of the conversations" if share else ""
    lines = [
        f"change to bundle {change.get('bundle')}: {change.get('state')}{trial}, "
        f"{change.get('verified', 0)} of {change.get('total', 0)} experts verified"
    ]
    if change.get("detail"):
        lines.append(_note("", change["detail"]))
    lines += [_note(name, reason) for name, reason in (change.get("refused") or {}).items()]
    return "\n".join(lines)


def _note(subject: str, text: str) -> str:
    line = f"{subject}: {text}" if subject else text
    return textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
