"""The gate: the decision that admits an expert to serving.

Pure. Knows nothing of how the losses were measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Verdict:
    """The gate's decision."""

    state: Literal["admitted", "held_back"]
    reason: str
    """Why, in one sentence."""


def judge(loss_base: float | None, loss_expert: float | None, margin: float) -> Verdict:
    """Admit an expert whose held-out loss lies more than `margin` below the base's.

    Without held-out text it is held back: what nobody has measured is not served, and the base
    answers for its cluster.

    Args:
        loss_base: nats per token of the base on the cluster's held-out text; none without any.
        loss_expert: the same with the expert.
        margin: `experts.gate_margin`, nats per token.
    """
    if loss_base is None or loss_expert is None:
        return Verdict("held_back", "no held-out text in its cluster to measure it on")
    figures = f"held-out loss {loss_expert:.4f} against the base's {loss_base:.4f} nats per token"
    if loss_base - loss_expert > margin:
        return Verdict("admitted", figures)
    wanted = f"more than {margin:g} below it" if margin else "below it"
    return Verdict("held_back", f"{figures}, not {wanted}")
