"""Counting and adding up."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from server.gateway.tallies import (
    Counters,
    Gauges,
    Histograms,
    Merge,
    Snapshot,
    exposition,
    merged,
)


def samples(snapshots: Sequence[Snapshot]) -> dict[tuple[str, ...], float]:
    """What Prometheus reads: values by sample name and label values, in the labels' order."""
    text = exposition(snapshots).decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_and_histograms_in_prometheus_terms() -> None:
    counters = Counters("asked", "Asked.", ("who",))
    counters.inc(("a",))
    counters.inc(("a",), by=2)
    histogram = Histograms("took", "Took.", (0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7):
        histogram.observe(value)
    read = samples([counters.snapshot(), histogram.snapshot()])
    assert read["asked_total", "a"] == 3
    assert read["took_bucket", "0.1"] == 2, "a bound belongs to its bucket"
    assert read["took_bucket", "1.0"] == 3
    assert read["took_bucket", "+Inf"] == read["took_count",] == 4
    assert read["took_sum",] == 0.05 + 0.1 + 0.5 + 7


def test_a_family_without_labels_is_there_from_the_start() -> None:
    assert samples([Counters("asked", "Asked.").snapshot()]) == {("asked_total",): 0}


def test_processes_add_up() -> None:
    def process(count: int, gauge: float, merge: Merge) -> list[Snapshot]:
        counters = Counters("asked", "Asked.", ("who",))
        counters.inc(("both",), by=count)
        counters.inc((f"only-{count}",))
        histogram = Histograms("took", "Took.", (1.0,), ("who",))
        histogram.observe(0.5 * count, ("both",))
        shown = Gauges("shown", "Shown.", (), lambda: {(): gauge}, merge)
        # as it travels between processes
        data = msgspec.json.encode([f.snapshot() for f in (counters, histogram, shown)])
        return msgspec.json.decode(data, type=list[Snapshot])

    for merge, value in (("sum", 7.0), ("max", 4.0), ("min", 3.0)):
        read = samples(merged([process(1, 3.0, merge), process(4, 4.0, merge)]))
        assert read["asked_total", "both"] == 5
        assert read["asked_total", "only-1"] == read["asked_total", "only-4"] == 1
        assert read["took_count", "both"] == 2
        assert read["took_bucket", "1.0", "both"] == 1
        assert read["took_sum", "both"] == 2.5
        assert read["shown",] == value


def test_a_process_with_other_buckets_is_left_out() -> None:
    one, other = Histograms("took", "Took.", (1.0,)), Histograms("took", "Took.", (2.0,))
    one.observe(0.5)
    other.observe(0.5)
    assert samples(merged([[one.snapshot()], [other.snapshot()]]))["took_count",] == 1
