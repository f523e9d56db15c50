"""From a model's name to the worker that answers: what a name means now, and which home is taken.

Everything that depends on the table alone is worked out once per table, so that a request costs a
look-up. This module knows nothing of HTTP and of how a text is routed.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from server.gateway.errors import ModelNotFoundError, NoEngineError
from server.table import RoutingTable

ROUTED_MODEL = "introvert"
"""The model name that routes by meaning."""

AVOID_S = 1.0
"""Seconds for which a worker that could not be reached is the last choice."""


@dataclass(frozen=True, slots=True)
class Home:
    """A ready worker."""

    worker: str
    url: str


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name means now: an expert or the base, and its ready homes."""

    served_name: str
    """The name in the engine and in the answer's `model`."""
    expert: str | None
    """The expert's id; none for the base."""
    version: str | None
    homes: tuple[Home, ...]
    model_json: msgspec.Raw
    """`served_name` as JSON, to be put into a body."""
    refused_by: tuple[str, ...] = ()
    """The workers that were to hold the expert, if every one of them refused it."""

    @property
    def label(self) -> str:
        """The expert's id, or `base`."""
        return self.expert or "base"


class Chooser:
    """The current table as the gateway uses it, and the requests in flight per worker."""

    def __init__(self, *, seed: int, retry_after_s: int) -> None:
        self.table: RoutingTable | None = None
        self.in_flight: defaultdict[str, int] = defaultdict(int)
        self._retry_after_s = retry_after_s
        self._random = random.Random(seed)
        self._avoided: dict[str, float] = {}
        self._base: Target | None = None
        self._targets: dict[str, Target] = {}
        self._by_expert: dict[str, Target] = {}

    def update(self, table: RoutingTable) -> None:
        """Serve by this table from now on; requests that run keep the home they have."""
        ready, holding = _homes(table)
        base = _target(table.base_name, None, None, ready)
        refused = table.refused_experts()
        by_expert = {
            e.id: _target(
                e.served_name,
                e.id,
                e.version,
                tuple(holding.get(e.served_name, ())),
                refused_by=tuple(e.workers) if e.served_name in refused else (),
            )
            for e in table.experts
        }
        targets = {target.served_name: target for target in by_expert.values()}
        self._targets = {**targets, **by_expert, table.base_name: base}
        self._by_expert = by_expert
        self._base = base
        self._avoided = {}
        self.table = table
        workers = {worker.id for worker in table.workers}
        for gone in [w for w, n in self.in_flight.items() if n == 0 and w not in workers]:
            del self.in_flight[gone]

    def named(self, model: str) -> Target:
        """What a model name means.

        Raises:
            NoEngineError: no table has come yet.
            ModelNotFoundError: no model has this name.
        """
        target = self._targets.get(model)
        if target is not None:
            return target
        self._base_or_raise()
        expert, at, _ = model.partition("@")
        current = self._by_expert.get(expert)
        if at and current is not None:
            raise ModelNotFoundError(
                f"'{model}' is not served: the current version is '{current.served_name}'. "
                f"Use that, or '{expert}' for whichever version is current.",
                param="model",
            )
        raise ModelNotFoundError(
            f"There is no model '{model[:200]}'. GET /v1/models lists them; '{ROUTED_MODEL}' "
            "routes by meaning.",
            param="model",
        )

    def routed(self, expert: str | None) -> Target:
        """Where a routed request goes: to its expert, or to the base where that is not served or
        was refused by all of its workers.

        Raises:
            NoEngineError: no table has come yet.
        """
        base = self._base_or_raise()
        target = base if expert is None else self._by_expert.get(expert, base)
        return base if target.refused_by else target

    def choose(self, target: Target, tried: set[str]) -> Home:
        """The less loaded of two ready homes not tried yet, taken at random where there are more.

        The power of two choices (Mitzenmacher, IEEE TPDS 2001): close to the least loaded of all,
        without the herd that chasing the least loaded causes among several gateways.

        Raises:
            NoEngineError: no home is left.
        """
        homes = [home for home in target.homes if home.worker not in tried]
        if not homes:
            raise self._no_engine(target)
        if len(homes) == 1:
            return homes[0]
        if self._avoided:
            now = time.monotonic()
            homes = [h for h in homes if self._avoided.get(h.worker, 0.0) <= now] or homes
        pair = self._random.sample(homes, min(2, len(homes)))
        return min(pair, key=lambda home: self.in_flight[home.worker])

    def avoid(self, worker: str) -> bool:
        """Make a worker the last choice for a short time, or until the table changes.

        Returns whether that is news under the current table.
        """
        news = worker not in self._avoided
        self._avoided[worker] = time.monotonic() + AVOID_S
        return news

    @contextmanager
    def busy(self, home: Home) -> Iterator[None]:
        """Count a request as in flight on a worker."""
        self.in_flight[home.worker] += 1
        try:
            yield
        finally:
            self.in_flight[home.worker] -= 1

    def _base_or_raise(self) -> Target:
        if self._base is None:
            raise NoEngineError(
                "No engine is ready yet. Try again shortly; GET /ready tells when.",
                retry_after_s=self._retry_after_s,
            )
        return self._base

    def _no_engine(self, target: Target) -> NoEngineError:
        if target.refused_by:
            return NoEngineError(
                f"'{target.served_name}' was refused by its workers "
                f"({', '.join(target.refused_by)}); GET /admin/status tells why. Use 'introvert' "
                "or another model until it has been published again.",
                retry_after_s=self._retry_after_s,
            )
        return NoEngineError(
            f"No engine that holds '{target.served_name}' can be reached now. Try again in "
            f"{self._retry_after_s} s, or use another model; GET /ready tells what is missing.",
            retry_after_s=self._retry_after_s,
        )


def _homes(table: RoutingTable) -> tuple[tuple[Home, ...], dict[str, list[Home]]]:
    """Ready workers, and by served name those that hold it (as `RoutingTable.ready_workers`).

    One pass over the table: asking it once per expert would be quadratic in thousands of experts.
    """
    ready = []
    holding: dict[str, list[Home]] = defaultdict(list)
    for worker in table.workers:
        if worker.state == "ready" and worker.url is not None:
            home = Home(worker.id, worker.url.rstrip("/"))
            ready.append(home)
            for served_name in worker.experts:
                holding[served_name].append(home)
    return tuple(ready), holding


def _target(
    served_name: str,
    expert: str | None,
    version: str | None,
    homes: tuple[Home, ...],
    refused_by: tuple[str, ...] = (),
) -> Target:
    return Target(
        served_name=served_name,
        expert=expert,
        version=version,
        homes=homes,
        model_json=msgspec.Raw(msgspec.json.encode(served_name)),
        refused_by=refused_by,
    )
