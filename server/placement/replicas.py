"""How many homes an expert needs: as many as its share of the load asks for, the quiet ones one."""

from __future__ import annotations

import math

from server.placement.types import Policy


def homes_needed(load: float, fair: float, now: int, workers: int, policy: Policy) -> int:
    """Homes that an expert is to have.

    Args:
        load: the expert's, in the unit of `fair`.
        fair: load of a worker if all were equally busy.
        now: homes it has; 0: it is new.
        workers: how many there are.
        policy: the largest number, how much of a worker one home may take, and how far past the
            point of change demand must be, so that noise around it does not come and go.
    """
    most = max(1, min(policy.max_replicas, workers))
    need = load / (fair * policy.replica_share) if fair > 0 else 0.0
    wanted = min(most, max(1, math.ceil(need)))
    kept = min(now, most)
    up = wanted > kept and need > kept * (1 + policy.hysteresis)
    down = wanted < kept and need < (kept - 1) * (1 - policy.hysteresis)
    return wanted if kept == 0 or up or down else kept
