from __future__ import annotations

import pytest

from server.placement import expected


def test_demand_is_smoothed() -> None:
    steady = {f"expert-{i:04d}": 10.0 for i in range(10)}
    found = expected(steady, {**steady, "expert-0003": 11.0, "expert-0004": 0.0}, workers=2)
    assert found["expert-0003"] == pytest.approx(10.3)
    assert found["expert-0004"] == pytest.approx(7.0)
    assert found["expert-0005"] == 10.0


def test_a_crowd_is_believed_at_once_and_forgotten_slowly() -> None:
    quiet = {f"expert-{i:04d}": 1.0 for i in range(10)}
    found = expected(quiet, {**quiet, "expert-0003": 50.0}, workers=2)
    assert found["expert-0003"] == 50.0
    assert expected(found, quiet, workers=2)["expert-0003"] == pytest.approx(50 - 0.3 * 49)


def test_experts_come_and_go() -> None:
    assert expected({}, {"a": 2.0}, workers=1) == {"a": 2.0}
    assert expected({"a": 2.0}, {}, workers=1) == {"a": pytest.approx(1.4)}
    assert expected({"a": 2.0}, {"a": 2.0, "b": 0.1}, workers=1)["b"] == pytest.approx(0.03)
