"""Training of the student: a bag of hashed features and one hidden layer, by gradient descent.

Knows nothing of text. The targets are soft: what a softmax makes of the embedder's cosines, so that
a text between two clusters teaches that it lies between them. Torch is imported when asked for.
Letters of shapes: N texts, V features, E their width, H hidden units, K clusters, T targets kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from router.guess import TEMPERATURE

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Cosines = Floats | Callable[[Indices], Floats]
"""The embedder's cosines of N texts with K centroids, or what gives those of some texts."""

TARGETS = 32
"""Best clusters of a text whose cosines are learned; of the others, that they are not these."""

WIDTH = 64
HIDDEN = 256
HIDDEN_OF_MANY = 96
"""Hidden units from `MANY` clusters on, where the last product is what a guess costs."""
MANY = 512

BATCH = 256
EPOCHS = 10
FEWEST_STEPS, MOST_STEPS = 300, 1200
TABLE_RATE, LAYER_RATE = 0.02, 0.002
WARM_UP = 0.1
FEATURE_DROP, HIDDEN_DROP = 0.2, 0.3
MOST_FEATURES = 256
"""Features of a text that one step sees: a long text is seen by another sample each time."""
LEVEL_WEIGHT = 0.05
"""Weight of the cosines themselves beside their order."""
ROWS = 1024


@dataclass(frozen=True, slots=True)
class Bags:
    """Known features of N texts: those of text n lie at `bounds[n]:bounds[n + 1]`."""

    positions: npt.NDArray[np.int32]
    """Rows of the table, shape (F,)."""
    weights: Floats
    """Shape (F,)."""
    bounds: Indices
    """Shape (N + 1,)."""
    divisors: Floats
    """What the sum of a text's rows is divided by, shape (N,)."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The best clusters of N texts, falling, and their cosines: both of shape (N, T)."""

    cosines: Floats
    clusters: Indices
    total: int
    """Clusters in all, K."""


@dataclass(frozen=True, slots=True)
class Layers:
    """What is learned; logits times `TEMPERATURE` are estimates of cosines."""

    table_VE: Floats
    inner_EH: Floats
    inner_H: Floats
    outer_HK: Floats
    outer_K: Floats


def best_targets(cosines: Cosines, chosen: Indices) -> Targets:
    """The targets of the chosen texts; memory for `ROWS` rows of cosines at a time."""
    rows = cosines if callable(cosines) else cosines.__getitem__
    best, clusters, total = [], [], 0
    for start in range(0, len(chosen), ROWS):
        part_NK = np.asarray(rows(chosen[start : start + ROWS]), dtype=np.float32)
        total = part_NK.shape[1]
        kept_NT = np.argpartition(-part_NK, min(TARGETS, total) - 1, axis=1)[:, :TARGETS]
        values_NT = np.take_along_axis(part_NK, kept_NT, axis=1)
        order_NT = np.argsort(-values_NT, axis=1, kind="stable")
        best.append(np.take_along_axis(values_NT, order_NT, axis=1))
        clusters.append(np.take_along_axis(kept_NT, order_NT, axis=1))
    return Targets(np.concatenate(best), np.concatenate(clusters).astype(np.int64), total)


def gathered(bounds: Indices, places: Indices) -> tuple[Indices, Indices]:
    """Where the segments of some places lie, one after the other, and how long each is."""
    lengths = bounds[places + 1] - bounds[places]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(bounds[places] - (ends - lengths), lengths), lengths


def train(bags: Bags, targets: Targets, features: int, *, seed: int, threads: int) -> Layers:
    """Fit the layers; the same seed, data and number of threads give the same layers.

    The pace is bounded: `MOST_STEPS` batches of `BATCH` texts, of each `MOST_FEATURES` features.
    """
    import torch

    rng = np.random.default_rng(seed)
    hidden = HIDDEN if targets.total < MANY else HIDDEN_OF_MANY
    shapes = (
        (features, WIDTH),
        (WIDTH, hidden),
        (hidden,),
        (hidden, targets.total),
        (targets.total,),
    )
    scales = [np.float32(size) for size in (0.1, WIDTH**-0.5, 0, hidden**-0.5, 0)]
    parts = [
        torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * scale))
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    optimizers: tuple[Any, Any] = (
        torch.optim.SparseAdam(parts[:1], lr=TABLE_RATE),
        torch.optim.AdamW(parts[1:], lr=LAYER_RATE, weight_decay=0.01),
    )
    rates = TABLE_RATE, LAYER_RATE
    with torch_threads(threads):
        for rate, places in _schedule(len(targets.cosines), rng):
            for optimizer, full in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = full * rate
                optimizer.zero_grad()
            loss_of(_logits(parts, bags, places, rng), targets, places).backward()
            for optimizer in optimizers:
                optimizer.step()
    return Layers(*(part.detach().numpy() for part in parts))


def _schedule(texts: int, rng: np.random.Generator) -> Iterator[tuple[float, Indices]]:
    # Up in a straight line, then down to nothing; every text once before any comes again.
    batch = min(BATCH, texts)
    steps = min(max(EPOCHS * texts // batch, FEWEST_STEPS), MOST_STEPS)
    order, start = rng.permutation(texts), 0
    for step in range(steps):
        if start + batch > texts:
            order, start = rng.permutation(texts), 0
        yield min(1.0, (step + 1) / (steps * WARM_UP)) * (1 - step / steps), order[start:][:batch]
        start += batch


def _logits(parts: list[Any], bags: Bags, places: Indices, rng: np.random.Generator) -> Any:
    import torch

    where, lengths = gathered(bags.bounds, places)
    keep_N = np.minimum(1 - FEATURE_DROP, MOST_FEATURES / np.maximum(lengths, 1))
    keep_F = np.repeat(keep_N, lengths).astype(np.float32)
    seen = rng.random(len(where), dtype=np.float32) < keep_F
    owner = np.repeat(np.arange(len(places)), lengths)[seen]
    weights = bags.weights[where[seen]] / (keep_F[seen] * bags.divisors[places][owner])
    counts = np.bincount(owner, minlength=len(places))
    sums_NE = torch.nn.functional.embedding_bag(
        torch.from_numpy(bags.positions[where[seen]].astype(np.int64)),
        parts[0],
        torch.from_numpy(np.cumsum(counts) - counts),
        mode="sum",
        per_sample_weights=torch.from_numpy(weights.astype(np.float32)),
        sparse=True,
    )
    hidden_NH = torch.relu(sums_NE @ parts[1] + parts[2])
    kept_NH = rng.random(tuple(hidden_NH.shape), dtype=np.float32) >= HIDDEN_DROP
    kept = torch.from_numpy(kept_NH.astype(np.float32) / np.float32(1 - HIDDEN_DROP))
    return (hidden_NH * kept) @ parts[3] + parts[4]


def loss_of(logits_NK: Any, targets: Targets, places: Indices) -> Any:
    """How far the logits of some texts, shape (n, K), are from their targets; a scalar tensor."""
    import torch

    cosines_NT = torch.from_numpy(targets.cosines[places]) / TEMPERATURE
    chosen_NT = logits_NK.gather(1, torch.from_numpy(targets.clusters[places]))
    soft_NT = cosines_NT.softmax(-1)
    order_N = logits_NK.logsumexp(-1) - (soft_NT * chosen_NT).sum(-1)
    level_N = ((chosen_NT - cosines_NT) ** 2).mean(-1)
    return (order_N + LEVEL_WEIGHT * level_N).mean()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Bound torch's threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
