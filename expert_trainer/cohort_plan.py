"""Which experts are trained together: planned once, then kept for as long as any is missing.

Who shares a pass of the base changes the last bits of an adapter, and a cohort's checkpoint is of
these members and no others. So a run that resumes takes the plan of the run before it, whatever
the cluster looks like now. Knows nothing of Ray or of training.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Literal

from configs.schema import ExpertsConfig
from expert_trainer.expert import TrainJob
from expert_trainer.schedule import plan_cohorts
from expert_trainer.storage import Storage

PLAN_FILE = "cohorts.json"
PASS_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Tokens of one pass from which on a larger one is no faster, see `bench/fused.py`."""


def group(
    jobs: Sequence[TrainJob],
    missing: Collection[str],
    *,
    place: Storage | None,
    actors: int,
    fused: int,
) -> list[tuple[TrainJob, ...]]:
    """Cohorts that between them hold every missing job, longest first.

    A cohort of an earlier plan comes with its finished members, whose place in it counts.

    Args:
        jobs: all jobs of the run.
        missing: ids of those that are not finished.
        place: where the plan is kept; none: it is not.
        actors: actors that will share a new plan.
        fused: members of a new cohort at the most.

    Raises:
        StorageError: the plan cannot be written.
    """
    by_digest = {job.digest: job for job in jobs}
    wanted = {job.digest for job in jobs if job.id in missing}
    stored = [members for members in _read(place) if by_digest.keys() >= set(members)]
    needed = [members for members in stored if wanted.intersection(members)]
    if wanted - {digest for members in needed for digest in members}:
        todo = [job for job in jobs if job.id in missing]
        indices = plan_cohorts([job.steps for job in todo], actors=actors, fused=fused)
        needed = [[todo[index].digest for index in cohort] for cohort in indices]
        if place is not None:
            place.write(PLAN_FILE, (json.dumps(needed, indent=1) + "\n").encode())
    return [tuple(by_digest[digest] for digest in members) for members in needed]


def auto_fused(experts: ExpertsConfig, device: Literal["cpu", "cuda"]) -> int:
    """Members of a cohort with `experts.fused: auto`: as many as fill a pass of the device."""
    return max(1, PASS_TOKENS[device] // (experts.sequence_length * experts.batch_rows))


def _read(place: Storage | None) -> list[list[str]]:
    """The digests of each planned cohort's members; none where there is no plan to be read."""
    if place is None:
        return []
    try:
        stored = json.loads(place.read(PLAN_FILE))
    except (FileNotFoundError, ValueError):
        return []
    if not isinstance(stored, list) or not all(isinstance(members, list) for members in stored):
        return []
    return stored
