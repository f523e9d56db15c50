"""Traffic for the placement's simulator: who is asked when, seeded, in short windows.

A pattern is a rate and a distribution over experts for every moment of a run; both hold still for
a window of a few seconds, within which arrivals are Poisson.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WINDOW_S = 5.0
ZIPF = 1.0
GROUPS = 8
"""Groups of experts whose days are shifted against each other."""


@dataclass(frozen=True)
class Requests:
    """The arrivals of one window, in order."""

    times: list[float]
    experts: list[int]
    services: list[float]
    """Seconds in the engine, without any wait."""


@dataclass(frozen=True)
class Pattern:
    """How demand changes over a run."""

    name: str
    demand: Callable[[float], Floats]
    """Requests per second of every expert, by the share of the run that has passed."""

    def windows(self, seconds: float, service_s: float, seed: int) -> Iterator[Requests]:
        """The requests of a run, window by window."""
        rng = np.random.default_rng(seed)
        for begin in np.arange(0.0, seconds, WINDOW_S):
            demand = self.demand(float(begin) / seconds)
            count = rng.poisson(demand.sum() * WINDOW_S)
            edges = np.cumsum(demand)
            experts = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
            yield Requests(
                times=np.sort(begin + WINDOW_S * rng.random(count)).tolist(),
                experts=np.minimum(experts, len(demand) - 1).tolist(),
                services=rng.gamma(2.0, service_s / 2.0, count).tolist(),
            )


def patterns(experts: int, rate: float, seed: int) -> list[Pattern]:
    """The patterns for so many experts that ask for `rate` requests per second on average."""
    rng = np.random.default_rng(seed)
    popularity = rng.permutation((1.0 + np.arange(experts)) ** -ZIPF)
    popularity *= rate / popularity.sum()
    return [
        Pattern("zipf", lambda _: popularity),
        _diurnal(popularity, rng),
        _flash_crowd(popularity),
    ]


def _diurnal(popularity: Floats, rng: np.random.Generator) -> Pattern:
    """One day: each group of experts has its own noon, at which it is 19 times as busy as at its
    midnight; and all together are asked 20% more at one time of the day than on average."""
    phases = rng.integers(0, GROUPS, len(popularity)) / GROUPS

    def demand(passed: float) -> Floats:
        busy = popularity * (1 + 0.9 * np.cos(2 * np.pi * (passed - phases)))
        total = popularity.sum() * (1 + 0.2 * np.sin(2 * np.pi * passed))
        found: Floats = busy * (total / busy.sum())
        return found

    return Pattern("diurnal", demand)


def _flash_crowd(popularity: Floats) -> Pattern:
    """Twice in the run an expert that hardly anybody asked for gets a tenth of all requests on
    top, within seconds, for a seventh of the run."""
    quiet = np.argsort(popularity)[len(popularity) // 2 :][:2]

    def demand(passed: float) -> Floats:
        found = popularity.copy()
        for begin, expert in zip((0.3, 0.7), quiet, strict=True):
            if begin <= passed < begin + 1 / 7:
                found[expert] += 0.1 * popularity.sum()
        return found

    return Pattern("flash_crowd", demand)
