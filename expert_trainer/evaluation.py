"""Use case `evaluate`: what routing to experts is worth on held-out text.

Five arms on the same documents: the base, the experts as they are routed to in serving, an expert
at random, the best choice in hindsight, and one single adapter trained on as many tokens as all
experts together. Knows nothing of how any of them was trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from configs.manifest import ExpertState, Record, Version
from configs.schema import RunConfig
from expert_trainer.arms import (
    BASE_ARM,
    RANDOM_DRAWS,
    SINGLE_ARM,
    Arms,
    headroom_closed,
    losses_by_arm,
    perplexities,
    routing_regret,
)
from expert_trainer.base import base_digest
from expert_trainer.bundle import COPIES_DIR, Bundle, open_published, router_version
from expert_trainer.cohort import Cohort
from expert_trainer.corpus import request_of
from expert_trainer.errors import BaseModelError, ExpertError, StaleBundleError
from expert_trainer.expert import Result, TrainJob, seed_of
from expert_trainer.fitting import ROUTER_DIR, FitSummary, heldout_documents, read_fit
from expert_trainer.hashed import HashedDirectory
from expert_trainer.job import Job
from expert_trainer.measuring import MeasureJob, SavedAdapter
from expert_trainer.pool import run_jobs
from expert_trainer.runtime import ray_session
from expert_trainer.shards import write_shard
from expert_trainer.storage import Storage
from expert_trainer.training import expert_jobs
from expert_trainer.types import Document, ExpertFailed, OnEvent
from router.model import Router
from router.types import Route, ignore

EVALUATION_DIR = "evaluation"
CHECKPOINTS_DIR = "checkpoints"


class ClusterEvaluation(Record):
    """The arms on the documents nearest to one cluster."""

    cluster: int
    expert: str
    state: ExpertState | None
    """The expert's state in the bundle; none where it could not be trained."""
    top_terms: list[str]
    abstained: int
    """Documents that the router left to the base."""
    arms: Arms | None
    """None where no document is nearest to this cluster."""


class SingleTry(Record):
    """The single adapter with one learning rate."""

    learning_rate: float
    valid_loss: float | None
    """Nats per token on the held-out text that the choice is made on."""
    chosen: bool
    steps: int
    tokens_seen: int
    seconds: float


class StudentEvaluation(Record):
    """What it costs that the router's student answers where the embedder would."""

    documents: int
    """That the student answered."""
    agreement: float
    """Share of them for which the embedder chooses the same expert, or the base as well."""
    regret: float
    """Nats per token by which these documents' loss is higher than with the embedder's choice."""


class Evaluation(Record):
    """What `introvert evaluate` reports."""

    bundle: Version
    split: str
    """`test`, or `valid` where the config names no test documents."""
    overall: Arms
    clusters: list[ClusterEvaluation]
    headroom_closed: float | None
    """Percent of the loss between base and hindsight that routing gains; none without any."""
    abstained: int
    student: StudentEvaluation | None = None
    """None where no student answered anything."""
    single: list[SingleTry]
    """The grid of the single adapter, the chosen one marked; empty where it was left out."""
    experts_tokens_seen: int
    """Tokens that the experts were trained on, all together."""
    seed: int
    random_draws: int
    seconds: float


def evaluate(config: RunConfig, on_event: OnEvent = ignore, *, baseline: bool = True) -> Evaluation:
    """Compare the published experts with the base and with one single adapter.

    Args:
        config: the run; its bundle must be published.
        on_event: told of the jobs on the way.
        baseline: train (or reuse) and measure the single adapter too.

    Raises:
        NotPublishedError, DamagedBundleError: no sound bundle.
        StaleBundleError: the bundle was made from another base or fit.
        BaseModelError: its experts are scaled otherwise than the config says.
        CorpusError: there is no held-out document.
        ExpertError: a measurement or the single adapter failed.
    """
    begin = time.perf_counter()
    fit, bundle = read_fit(config), open_published(config.bundle)
    _require_same(config, bundle)
    split, documents = heldout_documents(config, fit)
    router = serving_router(config, bundle)
    routes = serving_routes(router, documents)
    served = [entry.id for entry in bundle.manifest.served]
    with ray_session():
        tries = _train_single(config, fit, bundle, on_event) if baseline else []
        single = next((adapter for adapter, attempt in tries if attempt.chosen), None)
        losses = _measure(config, bundle, documents, single, on_event)
    tokens = losses[BASE_ARM][:, 1]
    choices = _choices(routes, served)
    nats = losses_by_arm(losses, served, choices, seed=config.seed)
    nearest = np.array([route.cluster for route in routes])
    abstained = np.array([route.abstained for route in routes])
    states = {entry.id: entry.state for entry in bundle.manifest.experts}
    everything = np.ones(len(documents), dtype=bool)
    return Evaluation(
        bundle=bundle.manifest.version,
        split=split,
        overall=perplexities(nats, tokens, everything),
        clusters=[
            ClusterEvaluation(
                cluster=cluster.cluster,
                expert=cluster.expert,
                state=states.get(cluster.expert),
                top_terms=cluster.top_terms,
                abstained=int(abstained[nearest == cluster.cluster].sum()),
                arms=perplexities(nats, tokens, nearest == cluster.cluster)
                if (nearest == cluster.cluster).any()
                else None,
            )
            for cluster in fit.clusters
        ],
        headroom_closed=headroom_closed(nats),
        abstained=int(abstained.sum()),
        student=_judged(router, served, documents, routes, losses),
        single=[attempt for _, attempt in tries],
        experts_tokens_seen=sum(
            bundle.card(entry).tokens_seen for entry in bundle.manifest.experts
        ),
        seed=config.seed,
        random_draws=RANDOM_DRAWS,
        seconds=time.perf_counter() - begin,
    )


def _require_same(config: RunConfig, bundle: Bundle) -> None:
    """See that the bundle is this run's: base, fit and the scaling of its experts."""
    base, work = bundle.manifest.base, Storage(config.bundle.work)
    if base_digest(config.base) != base.digest:
        raise StaleBundleError(
            f"{bundle.place} holds experts of another base ({base.name}, {base.model}) than "
            f"base.model {config.base.model}; set base.model back, or run `introvert train`"
        )
    if router_version(work / ROUTER_DIR) != bundle.manifest.router.version:
        raise StaleBundleError(
            f"{bundle.place} was not published from the fit in {work}; "
            "run `introvert train` to publish the new fit"
        )
    for card in bundle.cards(bundle.manifest.served):
        for key in ("rank", "alpha", "rslora"):
            theirs, ours = getattr(card, key), getattr(config.experts, key)
            if theirs != ours:
                raise BaseModelError(
                    f"{card.id} was trained with experts.{key}={_plain(theirs)}, but this run's "
                    f"config says {_plain(ours)}; set experts.{key} back, or train again"
                )


def serving_router(config: RunConfig, bundle: Bundle) -> Router:
    """The bundle's router."""
    return Router.load(bundle.router_dir, device=config.router.device)


def serving_routes(router: Router, documents: Sequence[Document]) -> list[Route]:
    """Where serving would send each document, the stickiness of chats included."""
    return router.route_conversations([request_of(document) for document in documents])


def _choices(routes: Sequence[Route], served: Sequence[str]) -> list[int | None]:
    """The expert of each route as an index into `served`; none: the base."""
    return [served.index(route.expert) if route.expert in served else None for route in routes]


def _judged(
    router: Router,
    served: Sequence[str],
    documents: Sequence[Document],
    routes: Sequence[Route],
    losses: dict[str, np.ndarray],
) -> StudentEvaluation | None:
    """The student's choices against those that the embedder makes of the same documents."""
    places = [place for place, route in enumerate(routes) if route.by == "student"]
    if not places:
        return None
    whole = router.embedder_routes([request_of(documents[place]) for place in places])
    chosen, wanted = _choices([routes[place] for place in places], served), _choices(whole, served)
    some = {arm: rows[places] for arm, rows in losses.items()}
    return StudentEvaluation(
        documents=len(places),
        agreement=float(np.mean([a == b for a, b in zip(chosen, wanted, strict=True)])),
        regret=routing_regret(some, served, chosen, wanted),
    )


def _train_single(
    config: RunConfig, fit: FitSummary, bundle: Bundle, on_event: OnEvent
) -> list[tuple[SavedAdapter, SingleTry]]:
    """The single adapter over the learning-rate grid: where it lies, and its figures.

    It sees every cluster's documents for as many steps as all experts together, and the rate is
    chosen on the validation documents.
    """
    jobs = _single_jobs(config, expert_jobs(config, fit, bundle.manifest.base.digest))
    results: dict[str, Result] = {
        job.id: result for job in jobs if (result := job.finished()) is not None
    }
    checkpoints = jobs[0].root / CHECKPOINTS_DIR
    missing = [
        Cohort((job,), checkpoints, config.experts.checkpoint_s)
        for job in jobs
        if job.id not in results
    ]
    results |= _run(missing, config, on_event)
    losses = [_or_infinite(results[job.id].heldout_loss_expert) for job in jobs]
    best = losses.index(min(losses))
    return [
        (
            _saved(config, job, results[job.id]),
            SingleTry(
                learning_rate=job.learning_rate,
                valid_loss=results[job.id].heldout_loss_expert,
                chosen=index == best,
                steps=results[job.id].steps,
                tokens_seen=results[job.id].tokens_seen,
                seconds=results[job.id].seconds,
            ),
        )
        for index, job in enumerate(jobs)
    ]


def _single_jobs(config: RunConfig, experts: Sequence[TrainJob]) -> list[TrainJob]:
    return [
        replace(
            experts[0],
            id=f"{SINGLE_ARM}-lr{rate:g}",
            shards=tuple(shard for job in experts for shard in job.shards),
            heldout=tuple(shard for job in experts for shard in job.heldout),
            heldout_limit=config.experts.heldout_tokens * len(experts),
            steps=sum(job.steps for job in experts),
            learning_rate=rate,
            seed=seed_of(config.seed, SINGLE_ARM),
            root=(Storage(config.bundle.work) / EVALUATION_DIR).absolute(),
            init=None,
        )
        for rate in config.experts.baseline_learning_rates
    ]


def _saved(config: RunConfig, job: TrainJob, result: Result) -> SavedAdapter:
    copies = config.bundle.scratch.absolute() / COPIES_DIR / EVALUATION_DIR
    return SavedAdapter(HashedDirectory(job.root / job.id, tuple(result.files)), copies / job.id)


def _measure(
    config: RunConfig,
    bundle: Bundle,
    documents: Sequence[Document],
    single: SavedAdapter | None,
    on_event: OnEvent,
) -> dict[str, np.ndarray]:
    """Losses of all documents under the base, every served expert and the single adapter."""
    place = (Storage(config.bundle.work) / EVALUATION_DIR).absolute()
    shard = write_shard(place, "documents.jsonl", documents)
    adapters: dict[str, SavedAdapter | None] = {BASE_ARM: None}
    for entry in bundle.manifest.served:
        files = bundle.expert(entry)
        here = replace(files, place=files.place.absolute())
        adapters[entry.id] = SavedAdapter(here, bundle.place_of(entry))
    if single is not None:
        adapters[SINGLE_ARM] = single
    experts = config.experts
    jobs = [
        MeasureJob(f"measure {arm}", adapter, shard, experts.sequence_length, experts.batch_rows)
        for arm, adapter in adapters.items()
    ]
    measured: dict[str, np.ndarray] = _run(jobs, config, on_event)
    return {arm: measured[f"measure {arm}"] for arm in adapters}


def _run(jobs: Sequence[Job], config: RunConfig, on_event: OnEvent) -> dict[str, Any]:
    outcomes = {}
    for event in run_jobs(jobs, config, on_event):
        if isinstance(event, ExpertFailed):
            raise ExpertError(f"{event.id} failed {event.attempt} times: {event.cause}")
        on_event(event)
        outcomes[event.id] = event.outcome
    return outcomes


def _plain(value: object) -> str:
    return str(value).removesuffix(".0")


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss
