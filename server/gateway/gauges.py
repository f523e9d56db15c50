"""What is true at the moment of a scrape: of the table, the workers, and who waits for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from server.gateway.breaker import BreakerState
from server.gateway.choice import Chooser
from server.gateway.metrics import Metrics
from server.gateway.readiness import Readiness
from server.gateway.tallies import Labels

BREAKER: Mapping[BreakerState, float] = {"closed": 0.0, "half-open": 0.5, "open": 1.0}
WORKER = ("worker",)


def show_state(metrics: Metrics, chooser: Chooser, readiness: Readiness) -> None:
    """Have the metrics show the state of a gateway's parts."""
    _show_workers(metrics, chooser)
    _show_table(metrics, chooser, readiness)
    metrics.gauge("processes", "Gateway processes that answered this scrape.", lambda: {(): 1})


def _show_workers(metrics: Metrics, chooser: Chooser) -> None:
    metrics.gauge("in_flight", "Requests in flight.", lambda: _labelled(chooser.in_flight), WORKER)
    metrics.gauge(
        "queued", "Requests that wait for the worker.", lambda: _labelled(chooser.queued), WORKER
    )
    metrics.gauge(
        "homeless",
        "Requests that wait for any worker to hold their expert again.",
        lambda: {(): chooser.homeless},
    )
    metrics.gauge(
        "breaker_open",
        "Whether the worker is left alone: 1, or 0.5 while it is tried again; of several processes "
        "the worst.",
        lambda: {(w,): BREAKER[chooser.breakers.state(w)] for w in chooser.in_flight},
        WORKER,
        merge="max",
    )
    metrics.gauge(
        "resident_experts",
        "Experts thought to be in the slots of a worker that holds more than it has slots.",
        lambda: _labelled(chooser.resident),
        WORKER,
        merge="max",
    )


def _show_table(metrics: Metrics, chooser: Chooser, readiness: Readiness) -> None:
    shown: tuple[tuple[str, str, Callable[[], float]], ...] = (
        (
            "table_version",
            "Version of the routing table in use; of several processes the oldest.",
            lambda: chooser.table.version if chooser.table else 0,
        ),
        (
            "ready_experts",
            "Experts that a ready worker holds.",
            lambda: readiness.coverage.experts_ready,
        ),
        (
            "placed_experts",
            "Experts in the routing table.",
            lambda: readiness.coverage.experts_total,
        ),
        (
            "ready_workers",
            "Workers that can answer.",
            lambda: readiness.coverage.workers_ready,
        ),
    )
    for name, documentation, value in shown:
        metrics.gauge(name, documentation, partial(_alone, value), merge="min")


def _alone(value: Callable[[], float]) -> dict[Labels, float]:
    return {(): value()}


def _labelled(values: Mapping[str, float]) -> dict[Labels, float]:
    return {(name,): value for name, value in values.items()}
