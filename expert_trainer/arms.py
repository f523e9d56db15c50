"""The arms that an evaluation compares, from the losses of single documents. Pure.

Knows nothing of how the losses were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from configs.manifest import Record

RANDOM_DRAWS = 5
BASE_ARM, SINGLE_ARM = "base", "single"


class Arms(Record):
    """Perplexity of each arm on some documents, weighted by tokens."""

    documents: int
    tokens: int
    """Tokens predicted."""
    base: float
    routed: float
    """Through the router, abstention and held-back experts (both mean: the base) included."""
    random: float
    """Served experts drawn evenly, the mean loss of several draws; the base if none is served."""
    hindsight: float
    """The best of the base and all served experts for each document: what a router can reach."""
    single: float | None
    """One adapter of equal rank for everything; none where it was left out."""


def losses_by_arm(
    losses: dict[str, np.ndarray],
    served: Sequence[str],
    choices: Sequence[int | None],
    *,
    seed: int,
) -> dict[str, np.ndarray]:
    """Nats of each document under each arm.

    Args:
        losses: by arm, `[documents, 2]`: nats and tokens.
        served: the experts that may be chosen.
        choices: the routed expert of each document, an index into `served`; none: the base.
        seed: of the random draws.
    """
    base = losses[BASE_ARM][:, 0]
    table = np.stack([losses[expert][:, 0] for expert in served]) if served else base[None]
    every = np.arange(len(base))
    picked = np.array([-1 if choice is None else choice for choice in choices])
    draws = np.random.default_rng(seed).integers(len(table), size=(RANDOM_DRAWS, len(base)))
    arms = {
        "base": base,
        "routed": np.where(picked < 0, base, table[picked, every]),
        "random": table[draws, every].mean(axis=0),
        "hindsight": np.minimum(base, table.min(axis=0)),
    }
    if SINGLE_ARM in losses:
        arms["single"] = losses[SINGLE_ARM][:, 0]
    return arms


def routing_regret(
    losses: dict[str, np.ndarray],
    served: Sequence[str],
    chosen: Sequence[int | None],
    wanted: Sequence[int | None],
) -> float:
    """Nats per token by which some choices of experts do worse than others of the same documents.

    Args:
        losses: by arm, `[documents, 2]`: nats and tokens.
        served: the experts that may be chosen.
        chosen: the expert of each document, an index into `served`; none: the base.
        wanted: what it is compared with, likewise.
    """
    mine, best = (
        losses_by_arm(losses, served, choices, seed=0)["routed"] for choices in (chosen, wanted)
    )
    return float((mine - best).sum() / max(1.0, losses[BASE_ARM][:, 1].sum()))


def perplexities(nats: dict[str, np.ndarray], tokens: np.ndarray, mask: np.ndarray) -> Arms:
    """Perplexity of every arm on the documents of a mask, given all documents' nats and tokens."""
    total = tokens[mask].sum()
    values = {arm: math.exp(each[mask].sum() / total) for arm, each in nats.items()}
    return Arms(
        documents=int(mask.sum()),
        tokens=int(total),
        base=values["base"],
        routed=values["routed"],
        random=values["random"],
        hindsight=values["hindsight"],
        single=values.get("single"),
    )


def headroom_closed(nats: dict[str, np.ndarray]) -> float | None:
    """Percent of the loss between base and hindsight that routing gains; none without any."""
    headroom = nats["base"].sum() - nats["hindsight"].sum()
    if headroom <= 0:
        return None
    return float(100 * (nats["base"].sum() - nats["routed"].sum()) / headroom)
