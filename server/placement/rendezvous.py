"""Rendezvous hashing: which workers an expert would rather live on, whoever else is there.

Every pair of an expert and a worker has a score that depends on the two alone, so a worker that
comes or goes changes the order of no others: an expert's home is lost with its worker, and it goes
to the next one in its order; a worker that comes takes only those experts that put it first.
(Thaler and Ravishankar, IEEE/ACM Trans. Networking 6(1), 1998, "highest random weight".)
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def scores(
    experts: Sequence[str], workers: Sequence[str], weights: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Scores of all pairs, `[expert, worker]`; the highest is where an expert would rather live.

    A worker is first for a share of the experts that is its share of the weights: the score is
    -weight / ln(u) with u uniform in (0, 1) (Schindelhauer and Schomaker, SPAA 2005).
    """
    pairs = _hashes(experts)[:, None] ^ _hashes(workers)[None, :]
    uniform = ((_mixed(pairs) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    found: npt.NDArray[np.float64] = -np.asarray(weights, dtype=np.float64) / np.log(uniform)
    return found


def orders(scored: npt.NDArray[np.float64]) -> list[list[int]]:
    """Workers by number for every expert, best first."""
    found: list[list[int]] = np.argsort(-scored, axis=1, kind="stable").tolist()
    return found


def _hashes(names: Sequence[str]) -> npt.NDArray[np.uint64]:
    digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): each bit depends on all."""
    values = values + _INCREMENT
    values = (values ^ (values >> np.uint64(30))) * _FACTORS[0]
    values = (values ^ (values >> np.uint64(27))) * _FACTORS[1]
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
