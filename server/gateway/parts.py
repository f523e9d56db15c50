"""The parts of one gateway, made once and handed to whatever needs them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from configs.schema import GatewayConfig, RunConfig
from server.batch.store import DIRECTORY, Store
from server.gateway.choice import Chooser
from server.gateway.counts import Counts
from server.gateway.gauges import show_state
from server.gateway.metrics import Metrics
from server.gateway.prefetch import Prefetch
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
    prefetch: Prefetch
    keyring: Keyring
    counts: Counts
    """Requests in flight by worker, over all gateway processes."""
    metrics: Metrics
    recorder: RequestRecorder
    store: Store
    """Files and batches; opened when somebody asks for them."""
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
        upstream = Upstream(gateway, engine_key=seat.engine_key)
        parts = cls(
            config=gateway,
            seat=seat,
            chooser=Chooser(gateway, counts, seed=config.seed),
            readiness=Readiness(),
            routing=Routing(
                router_source,
                retry_after_s=gateway.retry_after_s,
                patience_s=gateway.queue_timeout_s,
            ),
            upstream=upstream,
            prefetch=Prefetch(upstream, metrics),
            keyring=Keyring(
                Path(gateway.keys_file) if gateway.keys_file else None,
                counts=seat.counts(TENANTS_FILE),
                rates=seat.rates(),
                engine_key=seat.engine_key,
            ),
            counts=counts,
            metrics=metrics,
            recorder=RequestRecorder(metrics, listeners_for(gateway, seat.number)),
            store=Store(config.bundle.scratch / DIRECTORY),
            started=datetime.now(UTC),
        )
        show_state(metrics, parts.chooser, parts.readiness)
        return parts

    def use(self, table: RoutingTable) -> None:
        """Serve by this table from now on."""
        self.chooser.update(table)
        self.readiness.update(table)
        bundles = {table.bundle: table.place}
        if table.canary is not None:
            bundles.setdefault(table.canary.bundle, table.canary.place)
        self.routing.serve(bundles)
