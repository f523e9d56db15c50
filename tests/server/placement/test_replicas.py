from __future__ import annotations

import pytest

from server.placement import Policy
from server.placement.replicas import homes_needed

POLICY = Policy(max_replicas=4, replica_share=0.5, hysteresis=0.2)


@pytest.mark.parametrize(("load", "homes"), [(0.0, 1), (0.49, 1), (0.51, 2), (1.2, 3), (9.0, 4)])
def test_homes_follow_the_load(load: float, homes: int) -> None:
    assert homes_needed(load, 1.0, 0, 8, POLICY) == homes


@pytest.mark.parametrize(
    ("load", "now", "homes"),
    [
        (0.55, 1, 1),  # needs 1.1 homes: not yet worth another
        (0.65, 1, 2),
        (0.45, 2, 2),  # needs 0.9 homes: not yet worth one less
        (0.35, 2, 1),
        (0.10, 4, 1),
        (1.90, 1, 4),
    ],
)
def test_the_number_changes_only_well_past_the_point_of_change(
    load: float, now: int, homes: int
) -> None:
    assert homes_needed(load, 1.0, now, 8, POLICY) == homes


def test_no_more_homes_than_workers_or_allowed() -> None:
    assert homes_needed(9.0, 1.0, 0, 2, POLICY) == 2
    assert homes_needed(9.0, 1.0, 7, 8, POLICY) == 4
    assert homes_needed(0.0, 0.0, 0, 8, POLICY) == 1
