"""Counting, cheap enough for every request, and in a form that adds up over processes.

All of it is touched on the event loop alone, so nothing is locked: a count costs one look-up in a
dictionary. What Prometheus' text format looks like is `prometheus_client`'s business, at a scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Literal, Protocol

import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

Labels = tuple[str, ...]
Kind = Literal["counter", "histogram", "gauge"]
Merge = Literal["sum", "max", "min"]
"""What a family's value is over several processes; counters and histograms add up."""

_COMBINE: Mapping[Merge, Callable[[Iterable[float]], float]] = {"sum": sum, "max": max, "min": min}


class Snapshot(msgspec.Struct, frozen=True):
    """A family's values at one moment, as one process tells them to another."""

    name: str
    kind: Kind
    documentation: str
    labels: tuple[str, ...]
    samples: list[tuple[Labels, list[float]]]
    """Values by labels: one number, or a histogram's sum and the count of each bucket."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets but the last, which has none."""
    merge: Merge = "sum"


class Family(Protocol):
    """Values of one name, by labels."""

    name: str

    def snapshot(self) -> Snapshot:
        """What they are now."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Go on counting from there."""
        ...


class Counters:
    """A family of counters."""

    __slots__ = ("_documentation", "_labels", "_values", "name")

    def __init__(self, name: str, documentation: str, labels: Labels = ()) -> None:
        self.name, self._documentation, self._labels = name, documentation, labels
        self._values: dict[Labels, float] = {} if labels else {(): 0.0}

    def inc(self, labels: Labels = (), by: float = 1.0) -> None:
        """Count `by` more."""
        self._values[labels] = self._values.get(labels, 0.0) + by

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, labels: Labels) -> bool:
        return labels in self._values

    def snapshot(self) -> Snapshot:
        """What has been counted."""
        samples = [(labels, [value]) for labels, value in self._values.items()]
        return Snapshot(self.name, "counter", self._documentation, self._labels, samples)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on counting from there."""
        if snapshot.labels == self._labels:
            self._values.update((labels, row[0]) for labels, row in snapshot.samples)


class Histograms:
    """A family of histograms."""

    __slots__ = ("_bounds", "_documentation", "_labels", "_values", "name")

    def __init__(
        self, name: str, documentation: str, bounds: Sequence[float], labels: Labels = ()
    ) -> None:
        self.name, self._documentation, self._labels = name, documentation, labels
        self._bounds = tuple(bounds)
        self._values: dict[Labels, list[float]] = {} if labels else {(): self._empty()}

    def observe(self, value: float, labels: Labels = ()) -> None:
        """Count one value into its bucket."""
        row = self._values.get(labels)
        if row is None:
            row = self._values[labels] = self._empty()
        row[0] += value
        row[1 + bisect_left(self._bounds, value)] += 1.0

    def snapshot(self) -> Snapshot:
        """Sum and bucket counts."""
        samples = [(labels, list(row)) for labels, row in self._values.items()]
        return Snapshot(
            self.name, "histogram", self._documentation, self._labels, samples, self._bounds
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on counting from there."""
        if (snapshot.labels, snapshot.buckets) == (self._labels, self._bounds):
            self._values.update((labels, list(row)) for labels, row in snapshot.samples)

    def _empty(self) -> list[float]:
        return [0.0] * (len(self._bounds) + 2)


class Gauges:
    """A family of gauges whose values are asked for at a scrape, so that they cannot drift."""

    __slots__ = ("_documentation", "_labels", "_merge", "_source", "name")

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Labels,
        source: Callable[[], Mapping[Labels, float]],
        merge: Merge = "sum",
    ) -> None:
        self.name, self._documentation, self._labels = name, documentation, labels
        self._source, self._merge = source, merge

    def snapshot(self) -> Snapshot:
        """The values as they are now."""
        samples = [(labels, [float(value)]) for labels, value in self._source().items()]
        return Snapshot(
            self.name, "gauge", self._documentation, self._labels, samples, merge=self._merge
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Nothing to go on from: the values are asked for."""


def merged(processes: Iterable[Sequence[Snapshot]]) -> list[Snapshot]:
    """The families of several processes as those of one."""
    families: dict[str, tuple[Snapshot, dict[Labels, list[float]]]] = {}
    for snapshots in processes:
        for one in snapshots:
            first, values = families.setdefault(one.name, (one, {}))
            if first.buckets != one.buckets or first.labels != one.labels:
                continue  # a process of another version, on its way out
            combine = _COMBINE[one.merge]
            for labels, row in one.samples:
                so_far = values.get(labels)
                values[labels] = (
                    row
                    if so_far is None
                    else [combine(pair) for pair in zip(so_far, row, strict=True)]
                )
    return [
        msgspec.structs.replace(first, samples=list(values.items()))
        for first, values in families.values()
    ]


def exposition(snapshots: Sequence[Snapshot]) -> bytes:
    """Families in Prometheus' text format."""
    return generate_latest(_Given(snapshots))


class _Given(Collector):
    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        for one in self._snapshots:
            yield _metric(one)


def _metric(one: Snapshot) -> Metric:
    if one.kind == "histogram":
        histogram = HistogramMetricFamily(one.name, one.documentation, labels=one.labels)
        bounds = [*map(str, one.buckets), "+Inf"]
        for labels, (total, *counts) in one.samples:
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            histogram.add_metric(labels, buckets, total)
        return histogram
    kind = CounterMetricFamily if one.kind == "counter" else GaugeMetricFamily
    metric = kind(one.name, one.documentation, labels=one.labels)
    for labels, (value,) in one.samples:
        metric.add_metric(labels, value)
    return metric
