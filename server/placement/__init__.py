"""Experts to workers. Pure: demands and capacities in, homes out.

Knows nothing of Ray, of engines, or of where the measured mass comes from.
"""

from server.placement.measured import expected
from server.placement.plan import plan_placement, replan
from server.placement.types import ExpertDemand, Placement, Policy, WorkerCapacity, moved

__all__ = [
    "ExpertDemand",
    "Placement",
    "Policy",
    "WorkerCapacity",
    "expected",
    "moved",
    "plan_placement",
    "replan",
]
