from __future__ import annotations

import numpy as np

from server.placement.rendezvous import orders, scores

EXPERTS = [f"expert-{i:04d}" for i in range(4000)]
WORKERS = [f"worker-{i}" for i in range(8)]


def firsts(workers: list[str], weights: list[float]) -> list[str]:
    return [workers[order[0]] for order in orders(scores(EXPERTS, workers, weights))]


def test_a_worker_is_first_for_its_share_of_the_weights() -> None:
    found = firsts(WORKERS, [1.0] * 7 + [3.0])
    counts = np.array([found.count(worker) for worker in WORKERS])
    assert np.abs(counts / 4000 - np.array([0.1] * 7 + [0.3])).max() < 0.02


def test_a_worker_that_goes_changes_no_other_firsts() -> None:
    before, after = firsts(WORKERS, [1.0] * 8), firsts(WORKERS[1:], [1.0] * 7)
    assert all(b == a for b, a in zip(before, after, strict=True) if b != "worker-0")


def test_scores_are_the_same_on_every_machine() -> None:
    found = scores(["expert-0000"], ["worker-0", "worker-1"], [1.0, 1.0])
    np.testing.assert_allclose(found, [[1.9587261609810638, 4.7756189978086425]], rtol=1e-12)
