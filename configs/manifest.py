"""The bundle's manifest and the experts' cards: what trainer and server hand each other.

A bundle is a directory:

    manifest.json                                  the one file that changes, replaced by rename
    router/VERSION/…                               centroids and calibration
    experts/expert-0007/VERSION/adapter_model.safetensors, adapter_config.json, card.json

A VERSION is a content hash, so a versioned directory never changes once the manifest names it.
Reading and writing live in `expert_trainer.bundle`; this module is types alone.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1
MANIFEST_FILE = "manifest.json"
CARD_FILE = "card.json"
VERSION_LENGTH = 12

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
ExpertId = Annotated[str, Field(pattern=r"^expert-\d{4,}$")]
ExpertState = Literal["admitted", "held_back", "withdrawn"]


def expert_id(cluster: int) -> str:
    """Name of the expert of a cluster: `expert-0007`."""
    return f"expert-{cluster:04d}"


def content_version(files: list[FileEntry]) -> str:
    """Content hash of a set of files: 12 hex digits over their sorted paths and hashes."""
    digest = hashlib.sha256()
    for entry in sorted(files, key=lambda entry: entry.path):
        digest.update(f"{entry.path}\0{entry.sha256}\n".encode())
    return digest.hexdigest()[:VERSION_LENGTH]


class Record(BaseModel):
    """Base of everything stored in a bundle: frozen, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class FileEntry(Record):
    """One file of the bundle."""

    path: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$")
    """Path relative to the directory it is listed for; never absolute, never with `..`."""
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class Fingerprint(Record):
    """What an expert answers to a fixed probe, recorded at training and checked at every load."""

    token_ids: list[int] = Field(min_length=2)
    """The probe: token ids of the base's tokenizer."""
    logprobs: list[float] = Field(min_length=1)
    """Log-probability (nats) of each token after the first, given those before it."""


class LossPoint(Record):
    """One point of a loss curve."""

    step: int
    """Optimiser steps taken."""
    loss: float
    """Mean training loss since the point before, or the held-out loss at it, nats per token."""


class ExpertCard(Record):
    """Provenance and measurements of one expert."""

    id: ExpertId
    cluster: int
    base_digest: Sha256
    """Hash of the base's weights and config that the expert was trained on."""
    tokenizer_digest: Sha256 | None = None
    """Hash of the base's tokenizer and chat template; none on cards of format 1's first bundles,
    as are those fields below that have a default."""
    shards: list[Sha256] = []
    """Hashes of the files that hold the training documents."""
    heldout_shards: list[Sha256] = []
    """Hashes of the files that hold the held-out documents."""
    config: dict[str, Any] = {}
    """The `experts` section that the expert was trained with."""
    init: Literal["scratch"] | Sha256 = "scratch"
    """What it started from: nothing, or the shared adapter of that digest."""
    documents: int
    """Training documents of the cluster."""
    tokens: int
    """Tokens of those documents."""
    tokens_seen: int
    """Tokens trained on, repeats included."""
    steps: int
    """Optimiser steps taken."""
    best_step: int | None = None
    """The step whose values were kept: the last, or the best by held-out loss."""
    stopped_early: bool = False
    """Whether training ended before its last step because the held-out loss no longer fell."""
    seed: int
    rank: int
    alpha: float
    rslora: bool
    target_modules: list[str]
    learning_rate: float
    top_terms: list[str]
    """Words that set the cluster apart from the rest of the corpus, strongest first."""
    loss_curve: list[LossPoint]
    heldout_curve: list[LossPoint] = []
    """Held-out loss on the way, on a sample of the held-out documents."""
    heldout_documents: int
    heldout_tokens: int
    """Held-out tokens of the cluster on which the two losses were measured; 0: none were there."""
    heldout_loss_base: float | None
    """Nats per token of the base alone, as the training computes; none without held-out text."""
    heldout_loss_expert: float | None
    """Nats per token of the base with the expert."""
    state: Literal["admitted", "held_back"]
    """The gate's decision."""
    reason: str
    """Why, in one sentence."""
    fingerprint: Fingerprint
    seconds: float
    """Wall time of the training."""
    device: str
    created: str
    """UTC, ISO 8601."""
    code_version: str


class BaseEntry(Record):
    """The base that the experts belong to."""

    name: str
    """Name under which the endpoint serves it."""
    model: str
    """Directory or hub name at training time."""
    revision: str | None = None
    digest: Sha256


class RouterEntry(Record):
    """The router's files, below `router/VERSION/`."""

    version: Version
    clusters: int
    files: list[FileEntry]


class ExpertEntry(Record):
    """One expert, its files below `experts/ID/VERSION/`."""

    id: ExpertId
    version: Version
    """Hash over the adapter's weights and config; the card is not part of it."""
    cluster: int
    state: ExpertState
    """Only `admitted` experts are served; the clusters of others go to the base."""
    rank: int
    mass: Annotated[float, Field(ge=0, le=1)]
    """The cluster's share of the corpus, by tokens: the demand expected before any is measured."""
    files: list[FileEntry]

    @property
    def served_name(self) -> str:
        """Name in the engine and in answers, `expert-0007@3f2a9c…`: it never means two things."""
        return f"{self.id}@{self.version}"

    @property
    def directory(self) -> str:
        """Directory of the expert's files, relative to the bundle."""
        return f"experts/{self.id}/{self.version}"


class BundleManifest(Record):
    """Everything published together."""

    format: Literal[1] = 1
    version: Version
    created: str
    """UTC, ISO 8601."""
    code_version: str
    config_digest: Sha256
    """Hash of the run's config."""
    base: BaseEntry
    router: RouterEntry
    experts: list[ExpertEntry]
    digest: Sha256 | None = None
    """Hash over all the other fields, which makes a changed manifest tell; set on publishing."""

    @property
    def served(self) -> list[ExpertEntry]:
        """The experts that serving loads."""
        return [expert for expert in self.experts if expert.state == "admitted"]


def bundle_version(base: BaseEntry, router: RouterEntry, experts: list[ExpertEntry]) -> str:
    """Content hash of a bundle: its base, its router and every expert's version and state."""
    states = sorted(f"{expert.served_name}:{expert.state}" for expert in experts)
    content = [base.digest, router.version, *states]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:VERSION_LENGTH]
