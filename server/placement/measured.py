"""What experts will be asked for, from what they were asked for."""

from __future__ import annotations

from collections.abc import Mapping

NEWEST = 0.3
"""Weight of the newest measurement: noise of one interval moves nobody."""

CROWD = 0.25
"""Share of a worker's fair load by which an expert's demand must rise to be believed at once."""


def expected(
    before: Mapping[str, float], newest: Mapping[str, float], workers: int
) -> dict[str, float]:
    """Demand to plan for, by expert id, in the unit of the measurements.

    Demand is smoothed, as quiet experts are asked by chance alone in any short interval. Only a
    crowd does not wait for the average to follow: its rise is far beyond chance, and each interval
    without another home is one in which its queue grows.

    Args:
        before: what was expected so far; an expert that is missing counts as not asked for. Empty:
            nothing is known yet, and the newest stands.
        newest: measured since, in a comparable unit; an expert that is missing was not asked for.
        workers: how many there are.
    """
    if not before:
        return dict(newest)
    crowd = CROWD * sum(newest.values()) / workers
    found: dict[str, float] = {}
    for expert in before.keys() | newest.keys():
        old, new = before.get(expert, 0.0), newest.get(expert, 0.0)
        found[expert] = new if new - old > crowd else old + NEWEST * (new - old)
    return found
