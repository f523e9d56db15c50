"""What the gateway counts, for Prometheus.

Labels are bounded: endpoints of the protocol, experts and workers of the table, HTTP statuses;
never a text that a client sent. This module knows no request and no table; the gauges ask a
function for their values when they are scraped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

PREFIX = "introvert_gateway"

OVERHEAD_BUCKETS_S = (
    0.00005,
    0.0001,
    0.0002,
    0.0003,
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.05,
    0.25,
)
ROUTE_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0, 5.0)
FIRST_BYTE_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

NO_LABEL = "none"
"""Label of a request that ended before it had an expert or a worker."""


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is true at the moment of a scrape."""

    in_flight: Mapping[str, int]
    """Requests in flight, by worker."""
    table_version: int
    """0 before the first table."""
    ready_experts: int
    placed_experts: int
    ready_workers: int


class Metrics:
    """The counters and histograms of one application, in a registry of their own."""

    def __init__(self, gauges: Callable[[], Gauges]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}_requests",
            "Requests answered; status 499: the client hung up.",
            ["endpoint", "expert", "worker", "status"],
            registry=self.registry,
        )
        self._upstream_errors = Counter(
            f"{PREFIX}_upstream_errors",
            "Workers that could not be reached (unreachable), went away during a request (lost), "
            "fell silent (timeout) or answered with a status of 500 or more (answer).",
            ["worker", "kind"],
            registry=self.registry,
        )
        self.retries = Counter(
            f"{PREFIX}_retries",
            "Requests sent to another replica because a worker could not be reached.",
            registry=self.registry,
        )
        self._abstentions = Counter(
            f"{PREFIX}_abstentions",
            "Routed requests that the router left to the base.",
            registry=self.registry,
        )
        self._route_seconds = Histogram(
            f"{PREFIX}_route_seconds",
            "Routing by meaning, waiting for its batch included.",
            buckets=ROUTE_BUCKETS_S,
            registry=self.registry,
        )
        self.forward_overhead_seconds = Histogram(
            f"{PREFIX}_forward_overhead_seconds",
            "The gateway's own time up to the first byte sent to the client: from the whole body "
            "received, less routing and less the wait for the engine's first byte.",
            buckets=OVERHEAD_BUCKETS_S,
            registry=self.registry,
        )
        self.upstream_first_byte_seconds = Histogram(
            f"{PREFIX}_upstream_first_byte_seconds",
            "From the request handed to the HTTP client to the engine's first byte.",
            buckets=FIRST_BYTE_BUCKETS_S,
            registry=self.registry,
        )
        self.registry.register(_GaugeCollector(gauges))
        self._request_children: dict[tuple[str, str, str, int], Counter] = {}

    def request_ended(
        self, endpoint: str, expert: str | None, worker: str | None, status: int
    ) -> None:
        """Count a request. The labelled child is kept: looking it up costs more than counting."""
        key = (endpoint, expert or NO_LABEL, worker or NO_LABEL, status)
        child = self._request_children.get(key)
        if child is None:
            child = self._requests.labels(*key[:3], str(status))
            self._request_children[key] = child
        child.inc()

    def routed(self, seconds: float, *, abstained: bool) -> None:
        """Count a routed request and the time its routing took."""
        self._route_seconds.observe(seconds)
        if abstained:
            self._abstentions.inc()

    def upstream_failed(self, worker: str, kind: str) -> None:
        """Count a fault of a worker: `unreachable`, `lost`, `timeout` or `answer`."""
        self._upstream_errors.labels(worker, kind).inc()

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _GaugeCollector(Collector):
    """Gauges read at scrape time, which cost a request nothing and cannot drift."""

    def __init__(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[GaugeMetricFamily]:
        now = self._gauges()
        in_flight = GaugeMetricFamily(
            f"{PREFIX}_in_flight", "Requests in flight.", labels=["worker"]
        )
        for worker, count in now.in_flight.items():
            in_flight.add_metric([worker], count)
        yield in_flight
        for name, documentation, value in (
            ("table_version", "Version of the routing table in use.", now.table_version),
            ("ready_experts", "Experts that a ready worker holds.", now.ready_experts),
            ("placed_experts", "Experts in the routing table.", now.placed_experts),
            ("ready_workers", "Workers that can answer.", now.ready_workers),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", documentation, value=value)
