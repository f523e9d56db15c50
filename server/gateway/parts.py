"""The parts of one gateway, made once and handed to whatever needs them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from configs.schema import GatewayConfig, RunConfig
from server.gateway.choice import Chooser
from server.gateway.metrics import Gauges, Metrics
from server.gateway.readiness import Readiness
from server.gateway.routing import RouterSource, Routing
from server.gateway.upstream import Upstream
from server.table import RoutingTable


@dataclass(frozen=True, slots=True)
class Parts:
    """What the endpoints of an application share."""

    config: GatewayConfig
    chooser: Chooser
    readiness: Readiness
    routing: Routing
    upstream: Upstream
    metrics: Metrics
    started: datetime

    @classmethod
    def make(cls, config: RunConfig, router_source: RouterSource) -> Self:
        """New parts that have seen no table and loaded no router."""
        gateway = config.gateway
        chooser = Chooser(seed=config.seed, retry_after_s=gateway.retry_after_s)
        readiness = Readiness()

        def gauges() -> Gauges:
            return Gauges(
                in_flight=dict(chooser.in_flight),
                table_version=chooser.table.version if chooser.table else 0,
                ready_experts=readiness.coverage.experts_ready,
                placed_experts=readiness.coverage.experts_total,
                ready_workers=readiness.coverage.workers_ready,
            )

        return cls(
            config=gateway,
            chooser=chooser,
            readiness=readiness,
            routing=Routing(router_source, retry_after_s=gateway.retry_after_s),
            upstream=Upstream(gateway),
            metrics=Metrics(gauges),
            started=datetime.now(UTC),
        )

    def use(self, table: RoutingTable) -> None:
        """Serve by this table from now on."""
        self.chooser.update(table)
        self.readiness.update(table)
        bundles = {table.bundle: table.place}
        if table.canary is not None:
            bundles.setdefault(table.canary.bundle, table.canary.place)
        self.routing.serve(bundles)
