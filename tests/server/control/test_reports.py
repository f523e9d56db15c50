from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from server.control.reports import DemandMeter


@dataclass
class FakeReport:
    process: int
    demand: dict[str, float]
    table_version: int = 1
    routers: dict[str, str] = field(default_factory=dict)
    in_flight_bundles: dict[str, int] = field(default_factory=dict)


def test_rates_are_what_counters_of_all_processes_grew_by() -> None:
    meter = DemandMeter()
    assert meter.feed([FakeReport(0, {"a": 100.0})], 0.0) == {}
    rates = meter.feed([FakeReport(0, {"a": 104.0, "b": 1.0}), FakeReport(1, {"a": 2.0})], 2.0)
    assert rates == pytest.approx({"a": 3.0, "b": 0.5})
    assert meter.feed([FakeReport(0, {"a": 104.0, "b": 1.0})], 4.0) == {"a": 0.0, "b": 0.0}


def test_a_process_that_began_anew_counts_from_nothing() -> None:
    meter = DemandMeter()
    meter.feed([FakeReport(0, {"a": 100.0})], 0.0)
    assert meter.feed([FakeReport(0, {"a": 3.0})], 1.0) == {"a": 3.0}


def test_a_process_that_was_silent_for_a_while_is_not_counted_twice() -> None:
    meter = DemandMeter()
    meter.feed([FakeReport(0, {"a": 10.0})], 0.0)
    assert meter.feed([], 1.0) == {}
    assert meter.feed([FakeReport(0, {"a": 11.0})], 2.0) == {"a": 1.0}
