"""The general adapter that experts may start from, trained over all clusters.

It and the experts together see as many tokens as the experts alone would have. Knows nothing of
Ray or of how an adapter is trained.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pydantic import ValidationError

from configs.schema import RunConfig
from expert_trainer.expert import RESULT_FILE, InitialAdapter, Result, TrainJob, seed_of
from expert_trainer.shards import Shard, write_shard
from expert_trainer.storage import Storage
from expert_trainer.types import Document

SHARED = "shared"
"""Its name in events, and of its directory."""
SAMPLE_TOKENS = 20_000_000
"""Tokens of the documents that it learns from, at the most; more steps read them again. They are
held in memory together, and a few megabytes of weights learn nothing general from more."""


def shared_job(
    config: RunConfig, jobs: Sequence[TrainJob], cluster_tokens: Sequence[int]
) -> TrainJob:
    """The job of the general adapter, its shards sampled from all clusters in proportion.

    Args:
        config: the run.
        jobs: the experts' jobs as they would be without it.
        cluster_tokens: training tokens of each job's cluster.

    Raises:
        ExpertError: a shard that is missing or was changed after the fit.
        StorageError: the sample cannot be written.
    """
    steps = max(1, round(config.experts.shared_share * sum(job.steps for job in jobs)))
    total = sum(cluster_tokens)
    budget = min(SAMPLE_TOKENS, config.experts.shared_share * total)
    limit = config.experts.heldout_tokens
    place = jobs[0].shards[0].directory
    seed = seed_of(config.seed, SHARED)
    train = _sample((shard for job in jobs for shard in job.shards), budget / total, seed)
    heldout = _sample((shard for job in jobs for shard in job.heldout), 1.0, seed)
    return replace(
        jobs[0],
        id=SHARED,
        shards=(write_shard(place, f"{SHARED}.jsonl", train),),
        heldout=(write_shard(place, f"{SHARED}-heldout.jsonl", _shuffled(heldout, seed, limit)),),
        steps=steps,
        seed=seed,
    )


def adapter_of(shared: TrainJob) -> InitialAdapter:
    """The general adapter that a finished job has made."""
    return InitialAdapter(shared.root, shared.id, shared.digest)


def adapter_in_place(root: Storage) -> InitialAdapter | None:
    """The general adapter that an earlier run has made, whatever from; none if there is none.

    Raises:
        StorageError: its place cannot be read.
    """
    try:
        result = Result.model_validate_json(root.read(f"{SHARED}/{RESULT_FILE}"))
    except (FileNotFoundError, ValidationError):
        return None
    return InitialAdapter(root, SHARED, result.digest)


def start_from(initial: InitialAdapter, jobs: Sequence[TrainJob], share: float) -> list[TrainJob]:
    """The experts' jobs, each starting from the general adapter and that much shorter."""
    return [
        replace(job, steps=max(1, math.floor((1 - share) * job.steps)), init=initial)
        for job in jobs
    ]


def _sample(shards: Iterator[Shard], share: float, seed: int) -> Iterator[Document]:
    """A share of each shard's documents, at least one, drawn with the seed."""
    for shard in shards:
        documents = list(shard.documents())
        if documents:
            count = max(1, round(share * len(documents)))
            yield from random.Random(f"{seed}{shard.name}").sample(documents, count)


def _shuffled(documents: Iterator[Document], seed: int, limit: int) -> list[Document]:
    """At most `limit` documents of all, drawn with the seed."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    return order[:limit]
