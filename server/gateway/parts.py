"""The parts of one gateway, made once and handed to whatever needs them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from configs.schema import GatewayConfig, RunConfig
from server.gateway.choice import Chooser
from server.gateway.counts import Counts
from server.gateway.metrics import Metrics
from server.gateway.readiness import Readiness
from server.gateway.recorder import RequestRecorder, listeners_for
from server.gateway.routing import RouterSource, Routing
from server.gateway.seat import IN_FLIGHT_FILE, TENANTS_FILE, Seat
from server.gateway.tenants import Keyring
from server.gateway.upstream import Upstream
from server.table import RoutingTable

ALONE = Seat()


@dataclass(frozen=True, slots=True)
class Parts:
    """What the endpoints of an application share."""

    config: GatewayConfig
    seat: Seat
    chooser: Chooser
    readiness: Readiness
    routing: Routing
    upstream: Upstream
    keyring: Keyring
    counts: Counts
    """Requests in flight by worker, over all gateway processes."""
    metrics: Metrics
    recorder: RequestRecorder
    started: datetime

    @classmethod
    def make(cls, config: RunConfig, router_source: RouterSource, seat: Seat = ALONE) -> Self:
        """New parts that have seen no table and loaded no router.

        Raises:
            KeysError: the file of API keys cannot be used.
        """
        gateway = config.gateway
        metrics = Metrics()
        counts = seat.counts(IN_FLIGHT_FILE)
        parts = cls(
            config=gateway,
            seat=seat,
            chooser=Chooser(gateway, counts, seed=config.seed),
            readiness=Readiness(),
            routing=Routing(router_source, retry_after_s=gateway.retry_after_s),
            upstream=Upstream(gateway, engine_key=seat.engine_key),
            keyring=Keyring(
                Path(gateway.keys_file) if gateway.keys_file else None,
                counts=seat.counts(TENANTS_FILE),
                rates=seat.rates(),
            ),
            counts=counts,
            metrics=metrics,
            recorder=RequestRecorder(metrics, listeners_for(gateway, seat.number)),
            started=datetime.now(UTC),
        )
        _show_state(parts)
        return parts

    def use(self, table: RoutingTable) -> None:
        """Serve by this table from now on."""
        self.chooser.update(table)
        self.readiness.update(table)
        bundles = {table.bundle: table.place}
        if table.canary is not None:
            bundles.setdefault(table.canary.bundle, table.canary.place)
        self.routing.serve(bundles)


def _show_state(parts: Parts) -> None:
    """Gauges of what the parts know."""
    gauge, readiness, chooser = parts.metrics.gauge, parts.readiness, parts.chooser
    gauge(
        "in_flight",
        "Requests in flight.",
        lambda: {(worker,): count for worker, count in chooser.in_flight.items()},
        labels=("worker",),
    )
    gauge(
        "table_version",
        "Version of the routing table in use; over several processes the oldest.",
        lambda: {(): chooser.table.version if chooser.table else 0},
        merge="min",
    )
    gauge(
        "ready_experts",
        "Experts that a ready worker holds.",
        lambda: {(): readiness.coverage.experts_ready},
        merge="min",
    )
    gauge(
        "placed_experts",
        "Experts in the routing table.",
        lambda: {(): readiness.coverage.experts_total},
        merge="min",
    )
    gauge(
        "ready_workers",
        "Workers that can answer.",
        lambda: {(): readiness.coverage.workers_ready},
        merge="min",
    )
    gauge("processes", "Gateway processes that answered this scrape.", lambda: {(): 1})
