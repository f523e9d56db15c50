"""One expert's specification, and what its finished directory says.

A finished directory appears whole and holds the adapter and `result.json`, which says what it was
made from, so that the same job finds it again and another job does not. Knows nothing of how
experts are trained, of Ray or of the gate.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from configs.manifest import (
    FileEntry,
    Fingerprint,
    LossPoint,
    Record,
    Sha256,
)
from configs.schema import ExpertsConfig
from expert_trainer.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from expert_trainer.shards import Shard
from expert_trainer.storage import Storage

RESULT_FILE = "result.json"
CURVE_POINTS = 50
_NOT_OF_THE_ADAPTER = frozenset(
    {
        "actors",
        "gpus_per_actor",
        "cpus_per_actor",
        "max_retries",
        "gate_margin",
        "baseline_learning_rates",
        "learning_rate",
        "epochs",
        "tokens_per_expert",
        "fused",
        "checkpoint_s",
        "retrain_growth",
        "init",
        "shared_share",
    }
)
"""Settings that change nothing in an adapter, or reach it as the job's own steps, rate and init."""


class Result(Record):
    """What one training made and measured."""

    digest: Sha256
    """Hash of everything the adapter depends on."""
    files: list[FileEntry]
    base_digest: Sha256
    tokenizer_digest: Sha256
    shards: list[Sha256]
    heldout_shards: list[Sha256]
    config: dict[str, Any]
    init: Literal["scratch"] | Sha256
    documents: int
    tokens: int
    tokens_seen: int
    steps: int
    best_step: int
    stopped_early: bool
    seed: int
    rank: int
    alpha: float
    rslora: bool
    target_modules: list[str]
    learning_rate: float
    loss_curve: list[LossPoint]
    heldout_curve: list[LossPoint]
    heldout_documents: int
    heldout_tokens: int
    heldout_loss_base: float | None
    heldout_loss_expert: float | None
    fingerprint: Fingerprint
    seconds: float
    device: str
    created: str
    code_version: str


@dataclass(frozen=True)
class InitialAdapter:
    """The finished directory that an expert's training starts from."""

    directory: Storage
    """Holds the finished directory."""
    name: str
    digest: Sha256
    """Of the job that made it: its result's."""


@dataclass(frozen=True)
class TrainJob:
    """One adapter to train; the pool's and the single baseline's alike."""

    id: str
    shards: tuple[Shard, ...]
    heldout: tuple[Shard, ...]
    heldout_limit: int
    """Held-out tokens, at the most, on which the losses are measured in the end."""
    steps: int
    """Optimiser steps, at the most."""
    learning_rate: float
    seed: int
    experts: ExpertsConfig
    base_digest: str
    tokenizer_digest: str
    dtype: str
    root: Storage
    """Where the finished directory appears, under the job's id."""
    init: InitialAdapter | None = None
    """What it starts from; none: an adapter that changes nothing."""

    @cached_property
    def digest(self) -> str:
        """Hash of everything the adapter and its measurements depend on."""
        experts = self.experts.model_dump(mode="json", exclude=set(_NOT_OF_THE_ADAPTER))
        inputs = {
            "shards": [shard.sha256 for shard in self.shards],
            "heldout": [shard.sha256 for shard in self.heldout],
            "heldout_limit": self.heldout_limit,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "experts": experts,
            "base": self.base_digest,
            "tokenizer": self.tokenizer_digest,
            "dtype": self.dtype,
            "init": self.init.digest if self.init else None,
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def finished(self) -> Result | None:
        """The result of an earlier run of this very job, if it is there and intact.

        Raises:
            StorageError: its place cannot be read.
        """
        try:
            result = Result.model_validate_json(self.root.read(f"{self.id}/{RESULT_FILE}"))
            if result.digest != self.digest:
                return None
            intact = result.files == adapter_files(self.root / self.id)
        except (FileNotFoundError, ValidationError):
            return None
        return result if intact else None


def seed_of(run_seed: int, name: str) -> int:
    """An expert's own seed, which does not depend on how many others there are."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}:{name}".encode(), digest_size=4).digest())


def adapter_files(directory: Storage) -> list[FileEntry]:
    """The files that make an adapter, hashed.

    Raises:
        FileNotFoundError: one is missing.
        StorageError: one cannot be read.
    """
    entries = []
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        content = directory.read(name)
        sha256 = hashlib.sha256(content).hexdigest()
        entries.append(FileEntry(path=name, sha256=sha256, bytes=len(content)))
    return entries
