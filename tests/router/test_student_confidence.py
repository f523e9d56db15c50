"""How sure guesses may be, learned from made-up guesses whose chance of being right is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from router.calibration import sure_from
from router.student_confidence import (
    LEAST_FITTED,
    MEASURES,
    Seen,
    confidence_of,
    fit_confidence,
    measures_of,
    unfitted,
    unseen_confidence,
)

CLUSTERS = 4
HARD = np.array([2.0, 0.0, 0.0, -2.0])
"""How much likelier than by their margin guesses at each cluster are right."""


def drawn(count: int, seed: int, short: bool = False) -> tuple[Seen, npt.NDArray[np.float64]]:
    """Guesses, and each one's chance of being right; short texts are the other way round."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, CLUSTERS)).astype(np.float32)
    best = (-logits).argsort(axis=1)
    values = np.take_along_axis(logits, best, axis=1)
    words = rng.integers(1, 50, count)
    measures = measures_of(logits, values, rng.random(count).astype(np.float32), words)
    odds = measures[:, 0] - 1 + HARD[best[:, 0]] * (-1 if short else 1)
    return Seen(values, best, measures, np.full(count, short)), 1 / (1 + np.exp(-odds))


def test_chances_are_learned_for_each_cluster_and_kind_of_text() -> None:
    parts, chances = zip(*(drawn(20_000, kind, bool(kind)) for kind in (0, 1)), strict=True)
    seen, chance = Seen.joined(parts), np.concatenate(chances)
    right = np.random.default_rng(9).random(len(chance)) < chance
    coefficients = fit_confidence(seen, right, CLUSTERS)
    found = confidence_of(seen, coefficients)
    assert np.abs(found - chance).mean() < 0.01
    assert np.abs(found - chance).max() < 0.1
    assert [guess.confidence for guess in seen.guesses(found)] == found.tolist()


def test_no_coefficients_would_have_been_likelier() -> None:
    """The gradient of what is maximised, taken numerically, is nothing at what was found."""
    seen, chance = drawn(400, 3)
    right = np.random.default_rng(4).random(400) < chance
    found = fit_confidence(seen, right, CLUSTERS)[0].astype(np.float64)
    mean, spread = seen.measures_NM.mean(axis=0), seen.measures_NM.std(axis=0)

    def likelihood(row: npt.NDArray[np.float64]) -> float:
        sums = seen.measures_NM @ row[:MEASURES] + row[MEASURES]
        sums = sums + row[MEASURES + 1 :][seen.clusters_N]
        constant = row[MEASURES] + mean @ row[:MEASURES]
        ridge = ((row[:MEASURES] * spread) ** 2).sum() + (row[MEASURES + 1 :] ** 2).sum()
        logs = np.where(right, -np.log1p(np.exp(-sums)), -np.log1p(np.exp(sums)))
        return float(logs.sum() - ridge / 2 - 1e-3 * constant**2 / 2)

    at = likelihood(found)
    for place in range(len(found)):
        for step in (-0.01, 0.01):
            other = found.copy()
            other[place] += step
            assert likelihood(other) < at


def test_a_cluster_of_few_guesses_is_not_trusted_for_their_luck() -> None:
    seen, _ = drawn(500, 5)
    rare = Seen(seen.values_NT, seen.best_NT % (CLUSTERS - 1), seen.measures_NM, seen.short_N)
    rare.best_NT[:3, 0] = CLUSTERS - 1
    right = np.random.default_rng(6).random(500) < 0.8
    right[:3] = True
    constants = fit_confidence(rare, right, CLUSTERS)[0, MEASURES + 1 :]
    assert 0 < constants[-1] < 1


def test_too_few_texts_teach_nothing() -> None:
    seen, _ = drawn(LEAST_FITTED - 1, 7)
    right = np.ones(LEAST_FITTED - 1, dtype=np.bool_)
    assert np.array_equal(fit_confidence(seen, right, CLUSTERS), unfitted(CLUSTERS))
    margins = seen.values_NT[:, 0] - seen.values_NT[:, 1]
    by_margin = confidence_of(seen, unfitted(CLUSTERS))
    assert by_margin == pytest.approx(1 / (1 + np.exp(-margins)), abs=1e-6)


def test_a_kind_of_too_few_texts_is_judged_as_the_other() -> None:
    many, chance = drawn(2000, 8)
    few, _ = drawn(LEAST_FITTED - 1, 9, short=True)
    right = np.random.default_rng(10).random(2000) < chance
    seen = Seen.joined([many, few])
    both = np.append(right, np.ones(len(few.short_N), dtype=np.bool_))
    long, short = fit_confidence(seen, both, CLUSTERS)
    assert np.array_equal(long, fit_confidence(many, right, CLUSTERS)[0])
    assert np.abs(short - long).max() < 0.5


def test_limits_hold_though_every_cluster_has_a_constant() -> None:
    """Drawn from the texts that the constants were fitted on, they would keep 98% here."""
    clusters, kept, promised = 1000, [], []
    for seed in range(4):
        seen, right = many(3000, clusters, seed)
        fresh, fresh_right = many(20_000, clusters, 100 + seed)
        own = unseen_confidence(seen, right, clusters)
        limits = sure_from(own, np.ones(3000), right, target=0.99, floor=0.0)
        assert limits.confidence is not None
        later = confidence_of(fresh, fit_confidence(seen, right, clusters))
        kept.append(fresh_right[later >= limits.confidence].mean())
        optimistic = confidence_of(seen, fit_confidence(seen, right, clusters))
        loose = sure_from(optimistic, np.ones(3000), right, target=0.99, floor=0.0)
        promised.append(fresh_right[later >= (loose.confidence or 1)].mean())
    assert np.mean(kept) >= 0.99
    assert np.mean(promised) < 0.99, "or this test shows nothing"


def many(count: int, clusters: int, seed: int) -> tuple[Seen, npt.NDArray[np.bool_]]:
    """Guesses among many clusters, none of which is harder than the others."""
    rng = np.random.default_rng(seed)
    measures = np.zeros((count, MEASURES), dtype=np.float32)
    measures[:, 0] = rng.gamma(2, 2, count)
    best = rng.integers(clusters, size=(count, 2))
    seen = Seen(measures[:, :2], best, measures, np.zeros(count, dtype=np.bool_))
    return seen, rng.random(count) < 1 / (1 + np.exp(-measures[:, 0]))
