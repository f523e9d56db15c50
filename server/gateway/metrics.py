"""What the gateway counts.

Labels are bounded: endpoints of the protocol, experts and workers of the table, HTTP statuses,
names of API keys; never a text that a client sent. With thousands of experts on dozens of workers
no histogram has an expert's label and only one counter has both. This module knows no table and no
process; gauges ask functions for their values when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from server.gateway.observation import Observation
from server.gateway.tallies import (
    Counters,
    Family,
    Gauges,
    Histograms,
    Labels,
    Merge,
    Snapshot,
    exposition,
)

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
REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)

NO_LABEL = "none"
"""Label of a request that ended before it had an expert or a worker."""

MAX_PAIRS = 65_536
"""Combinations of the labels of `requests` that are told apart. Experts move for as long as the
gateway lives; beyond this, requests of an expert and worker not met before are another worker's."""
OTHER = "other"

MAX_REASONS = 64
"""Reasons of refusals that are told apart; engines could invent more."""


class Metrics:
    """The counters and histograms of one process."""

    def __init__(self) -> None:
        self._families: list[Family] = []
        self._count_requests()
        self._count_experts()
        self._count_workers()

    def _count_requests(self) -> None:
        self._requests = self._counters(
            "requests",
            "Requests answered; status 499: the client hung up.",
            ("endpoint", "expert", "worker", "status"),
        )
        self._rejected = self._counters(
            "rejected", "Requests answered with an error, by its code.", ("reason",)
        )
        self._reasons: set[str] = set()
        self._seconds = self._histograms(
            "request_seconds",
            "From the whole body received to the end of the answer.",
            REQUEST_BUCKETS_S,
            ("endpoint",),
        )
        self.retries = self._counters(
            "retries", "Requests sent to another replica because one gave them no answer."
        )
        self._routes = self._counters(
            "routes", "Requests routed by meaning: by the student or the embedder.", ("by",)
        )
        self._abstentions = self._counters(
            "abstentions", "Routed requests that the router left to the base."
        )
        self._route_seconds = self._histograms(
            "route_seconds", "Routing by meaning, waiting for its batch included.", ROUTE_BUCKETS_S
        )
        self.forward_overhead_seconds = self._histograms(
            "forward_overhead_seconds",
            "The gateway's own time up to the first byte sent to the client: from the whole body "
            "received, less routing and less the wait for the engine's first byte.",
            OVERHEAD_BUCKETS_S,
        )
        self.upstream_first_byte_seconds = self._histograms(
            "upstream_first_byte_seconds",
            "From the request handed to the HTTP client to the engine's first byte.",
            FIRST_BYTE_BUCKETS_S,
        )
        self._tenants = self._counters(
            "tenant_requests", "Requests by API key and status.", ("tenant", "status")
        )
        self._tenant_tokens = self._counters(
            "tenant_tokens", "Tokens by API key; direction: prompt or output.", _TENANT_TOKENS
        )

    def _count_experts(self) -> None:
        expert = ("expert",)
        self._expert_requests = self._counters("expert_requests", "Requests answered.", expert)
        self._expert_queue = self._counters(
            "expert_queue_seconds", "Waiting in the gateway for a worker, in all.", expert
        )
        self._expert_engine = self._counters(
            "expert_first_byte_seconds", "Waiting for engines' first bytes, in all.", expert
        )
        self._prompt_tokens = self._counters("prompt_tokens", "Tokens of prompts.", expert)
        self._output_tokens = self._counters("output_tokens", "Tokens generated.", expert)
        self._cold = self._counters(
            "cold_loads", "Requests whose expert was in no slot of the worker.", expert
        )
        self._spills = self._counters(
            "spills",
            "Requests of an expert that went elsewhere, since the wait for it was too long.",
            ("expert", "to"),
        )

    def _count_workers(self) -> None:
        worker = ("worker",)
        self._worker_requests = self._counters(
            "worker_requests", "Requests by the worker that answered.", worker
        )
        self._worker_queue = self._histograms(
            "worker_queue_seconds", "Waiting in the gateway.", FIRST_BYTE_BUCKETS_S, worker
        )
        self._worker_first_byte = self._histograms(
            "worker_first_byte_seconds",
            "Waiting for the engine's first byte.",
            FIRST_BYTE_BUCKETS_S,
            worker,
        )
        self._worker_tokens = self._counters(
            "worker_output_tokens", "Tokens generated, by worker.", worker
        )
        self._worker_cold = self._counters(
            "worker_cold_loads", "Requests whose expert was in no slot of the worker.", worker
        )
        self._prefetches = self._counters(
            "prefetches",
            "Adapters copied into a slot while the requests that need them still waited.",
            worker,
        )
        self._upstream_errors = self._counters(
            "upstream_errors",
            "Workers that could not be reached (unreachable), went away during a request (lost), "
            "fell silent (timeout) or answered with a status of 500 or more (answer).",
            ("worker", "kind"),
        )

    def gauge(
        self,
        name: str,
        documentation: str,
        source: Callable[[], Mapping[Labels, float]],
        labels: Labels = (),
        merge: Merge = "sum",
    ) -> None:
        """Show what a function returns: values by labels (`()`: the only one).

        Args:
            name: without the prefix that all have.
            documentation: one sentence.
            source: asked at every scrape, on the event loop.
            labels: names of the labels.
            merge: what the value is over several processes.
        """
        self._families.append(Gauges(f"{PREFIX}_{name}", documentation, labels, source, merge))

    def count(self, request: Observation) -> None:
        """Count a request that is over."""
        expert, worker = request.expert or NO_LABEL, request.worker or NO_LABEL
        status = str(request.status)
        self._count_pair(request.endpoint, expert, worker, status)
        if request.began:
            self._seconds.observe(request.ended - request.began, (request.endpoint,))
        if request.route is not None:
            self.routed(request.route_s, abstained=request.route.abstained)
            self._routes.inc((request.routed_by or "embedder",))
        if request.error:
            self._rejected.inc((self._reason(request.error),))
        if request.retries:
            self.retries.inc(by=request.retries)
        if request.overhead_s is not None:
            self.forward_overhead_seconds.observe(request.overhead_s)
        if request.tenant:
            self._tenants.inc((request.tenant, status))
        if request.expert:
            self._count_of_expert(request, (expert,))
        if request.worker:
            self._count_of_worker(request, (worker,))
        self._count_tokens(request, expert, worker)

    def _count_pair(self, endpoint: str, expert: str, worker: str, status: str) -> None:
        labels = (endpoint, expert, worker, status)
        if len(self._requests) >= MAX_PAIRS and labels not in self._requests:
            labels = (endpoint, expert, OTHER, status)
        self._requests.inc(labels)

    def _count_of_expert(self, request: Observation, expert: Labels) -> None:
        self._expert_requests.inc(expert)
        if request.queue_s:
            self._expert_queue.inc(expert, request.queue_s)
        if request.engine_s:
            self._expert_engine.inc(expert, request.engine_s)
        if request.cold:
            self._cold.inc(expert)
        if request.spill and request.route is not None:
            self._spills.inc((request.route.expert or NO_LABEL, request.spill))

    def _count_of_worker(self, request: Observation, worker: Labels) -> None:
        self._worker_requests.inc(worker)
        self._worker_queue.observe(request.queue_s, worker)
        if request.engine_s:
            self.upstream_first_byte_seconds.observe(request.engine_s)
            self._worker_first_byte.observe(request.engine_s, worker)
        if request.cold:
            self._worker_cold.inc(worker)

    def _count_tokens(self, request: Observation, expert: str, worker: str) -> None:
        if request.prompt_tokens:
            self._prompt_tokens.inc((expert,), request.prompt_tokens)
            if request.tenant:
                self._tenant_tokens.inc((request.tenant, "prompt"), request.prompt_tokens)
        if request.output_tokens:
            self._output_tokens.inc((expert,), request.output_tokens)
            self._worker_tokens.inc((worker,), request.output_tokens)
            if request.tenant:
                self._tenant_tokens.inc((request.tenant, "output"), request.output_tokens)

    def routed(self, seconds: float, *, abstained: bool) -> None:
        """Count a routed request and the time its routing took."""
        self._route_seconds.observe(seconds)
        if abstained:
            self._abstentions.inc()

    def upstream_failed(self, worker: str, kind: str) -> None:
        """Count a fault of a worker: `unreachable`, `lost`, `timeout` or `answer`."""
        self._upstream_errors.inc((worker, kind))

    def prefetched(self, worker: str) -> None:
        """Count an adapter that was copied into a worker's slot ahead of its requests."""
        self._prefetches.inc((worker,))

    def snapshot(self) -> list[Snapshot]:
        """Everything, as it is now."""
        return [family.snapshot() for family in self._families]

    def restore(self, snapshots: Iterable[Snapshot]) -> None:
        """Go on counting from there; what is not counted any more is left out."""
        families = {family.name: family for family in self._families}
        for snapshot in snapshots:
            if snapshot.name in families:
                families[snapshot.name].restore(snapshot)

    def exposition(self) -> bytes:
        """Everything of this process, in Prometheus' text format."""
        return exposition(self.snapshot())

    def _reason(self, code: str) -> str:
        if code not in self._reasons:
            if len(self._reasons) >= MAX_REASONS:
                return OTHER
            self._reasons.add(code)
        return code

    def _counters(self, name: str, documentation: str, labels: Labels = ()) -> Counters:
        family = Counters(f"{PREFIX}_{name}", documentation, labels)
        self._families.append(family)
        return family

    def _histograms(
        self, name: str, documentation: str, bounds: tuple[float, ...], labels: Labels = ()
    ) -> Histograms:
        family = Histograms(f"{PREFIX}_{name}", documentation, bounds, labels)
        self._families.append(family)
        return family


_TENANT_TOKENS = ("tenant", "direction")
