"""Use case `train`: shards to experts, through the gate, to a published bundle.

All experts, those named, or those whose clusters grow by new documents; the others stay as the
bundle has them, byte for byte. Knows nothing of Ray but that there is a pool, and nothing of
serving.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from configs.manifest import BaseEntry, ExpertCard, ExpertEntry, Record
from configs.schema import RunConfig
from expert_trainer.base import base_digest as digest_of
from expert_trainer.base import tokenizer_digest
from expert_trainer.bundle import Bundle, ExpertDraft, open_published, publish, router_version
from expert_trainer.cohort import Cohort
from expert_trainer.cohort_plan import auto_fused, group
from expert_trainer.errors import (
    ExpertError,
    NotPublishedError,
    StaleBundleError,
    UnknownExpertError,
)
from expert_trainer.expert import Result, TrainJob, seed_of
from expert_trainer.fitting import ROUTER_DIR, FitSummary, FittedCluster, ensure_fit
from expert_trainer.gate import judge
from expert_trainer.growth import Growth, add_documents
from expert_trainer.places import require_places, run_lock
from expert_trainer.schedule import plan_crew, plan_jobs
from expert_trainer.storage import Storage
from expert_trainer.types import (
    ExpertFailed,
    ExpertFinished,
    ExpertReused,
    JobFinished,
    OnEvent,
    PoolEnded,
    TrainEvent,
)
from expert_trainer.warm_start import SHARED, adapter_in_place, adapter_of, shared_job, start_from
from router.types import OnProgress, ignore

EXPERTS_DIR, CHECKPOINTS_DIR = "experts", "checkpoints"


class Failure(Record):
    """An expert that could not be trained."""

    id: str
    cause: str


class TrainSummary(Record):
    """What a training run did."""

    bundle: str
    """Directory or URL of the bundle."""
    version: str
    """The bundle's content hash."""
    admitted: list[str]
    held_back: list[str]
    failed: list[Failure]
    """Their clusters go to the base, or stay with the version that the bundle had; the same
    command tries them again."""
    trained: list[str]
    """Experts that this run trained; the others were finished before."""
    tokens_seen: int
    """Tokens that this run trained on."""
    seconds: float
    actor_seconds: float
    """Wall time of all actors together, each from its first job to its last."""
    computing_seconds: float
    """Of these, inside forward, backward and optimiser steps."""


@dataclass(frozen=True)
class _Selection:
    """The experts that a run is about."""

    wanted: frozenset[str] | None
    """Ids; none: all."""
    anew: bool
    """Train them even if they are finished."""

    def picks(self, expert: str) -> bool:
        return self.wanted is None or expert in self.wanted


def train(
    config: RunConfig,
    on_event: OnEvent = ignore,
    *,
    only: Sequence[str] = (),
    add_data: Sequence[str] = (),
    fit: FitSummary | None = None,
    on_progress: OnProgress = ignore,
) -> TrainSummary:
    """Train every expert that is not finished yet and publish the bundle.

    Fits first where there is no fit of this config and data. Experts that fail are left out of
    the bundle and named in the summary; whoever asked should exit with an error then. What a run
    that was broken off has finished stands, and what it had begun goes on from its checkpoint.

    Args:
        config: the run.
        on_event: told of every step of the way; see `expert_trainer.types`.
        only: ids of the experts to train, even if they are finished; all others stay as they are.
        add_data: sources of documents to add to the clusters nearest to them; the experts of those
            that grow enough are trained again, all others stay as they are.
        fit: what `ensure_fit` has just returned for this config, where the caller has asked it
            already: whether a fit is of this data is found out by reading all of it.
        on_progress: told the stages of a fit.

    Raises:
        PlaceError: the bundle's or the working directory cannot be written to.
        RunningError: another process trains or fits in the same directory.
        ExpertError: no expert at all could be trained.
        UnknownExpertError: `only` names one that there is not.
        StaleBundleError: `only` or `add_data`, and the bundle is of another base or fit.
        TrainerError: what keeps the whole run from starting.
    """
    begin = time.perf_counter()
    require_places(config.bundle)
    with run_lock(config.bundle):
        fit = ensure_fit(config, on_progress) if fit is None else fit
        base = base_entry(config)
        before = _published(config, base) if only or add_data else None
        selection = _Selection(None, anew=False)
        if add_data:
            growth = add_documents(config, add_data, on_progress, fit=fit)
            fit = growth.fit
            if before is not None:
                selection = _Selection(_outgrown(before, fit, growth), anew=False)
        if only:
            selection = _Selection(_known(only, fit), anew=True)
        run = _Run(config, fit, base, on_event)
        run.train(selection)
        if not run.cards and before is None:
            raise ExpertError(f"no expert could be trained; the last cause: {run.failed[-1].cause}")
        return run.publish([] if before is None else before.manifest.experts, begin)


class _Run:
    """One training run: its jobs, what became of them, and the bundle they make."""

    def __init__(self, config: RunConfig, fit: FitSummary, base: BaseEntry, on_event: OnEvent):
        self.config, self.fit, self.base = config, fit, base
        self.clusters = {cluster.expert: cluster for cluster in fit.clusters}
        self.cards: dict[str, ExpertCard] = {}
        self.failed: list[Failure] = []
        self._on_event = on_event
        self._trained: list[str] = []
        self._jobs: dict[str, TrainJob] = {}
        self._spent = PoolEnded(0.0, 0.0)
        self._shared_tokens = 0
        self._checkpoints = Storage(config.bundle.work).absolute() / CHECKPOINTS_DIR

    def train(self, selection: _Selection) -> None:
        """Train what is selected and not finished."""
        config = self.config
        jobs = expert_jobs(config, self.fit, self.base.digest)
        if config.experts.init == SHARED:
            jobs = self._warm(jobs, fresh=selection.wanted is None)
        self._jobs = {job.id: job for job in jobs}
        missing = []
        for job in jobs:
            if not selection.picks(job.id):
                continue
            if selection.anew:
                job.root.remove(job.id)
            if (result := job.finished()) is None:
                missing.append(job.id)
            else:
                self.cards[job.id] = make_card(self.clusters[job.id], result, config)
                self._on_event(ExpertReused(job.id, self.cards[job.id]))
        running = run_experts(
            config,
            jobs,
            self._checkpoints,
            self._listen,
            missing=missing,
            keep_plan=selection.wanted is None,  # a chosen few are no part of the run's plan
        )
        for event in running:
            if isinstance(event, ExpertFailed):
                self.failed.append(Failure(id=event.id, cause=event.cause))
            elif event.id not in self.cards:  # a member of an old cohort that was finished before
                card = make_card(self.clusters[event.id], event.outcome, config)
                self.cards[event.id] = card
                self._trained.append(event.id)
                self._on_event(ExpertFinished(event.id, card))

    def publish(self, before: Sequence[ExpertEntry], begin: float) -> TrainSummary:
        """Publish what was trained or found, and of the entries before all others as they were."""
        config = self.config
        keep = [
            entry.model_copy(update={"mass": self.clusters[entry.id].mass})
            for entry in before
            if entry.id not in self.cards
        ]
        manifest = publish(
            config.bundle.path,
            base=self.base,
            router_dir=Storage(config.bundle.work) / ROUTER_DIR,
            clusters=len(self.fit.clusters),
            experts=[
                ExpertDraft(self._jobs[name].root / name, card, self.clusters[name].mass)
                for name, card in sorted(self.cards.items())
            ],
            config_digest=hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
            keep=keep,
        )
        seen = sum(self.cards[name].tokens_seen for name in self._trained)
        return TrainSummary(
            bundle=str(Storage(config.bundle.path)),
            version=manifest.version,
            admitted=[entry.id for entry in manifest.experts if entry.state == "admitted"],
            held_back=[entry.id for entry in manifest.experts if entry.state == "held_back"],
            failed=self.failed,
            trained=sorted(self._trained),
            tokens_seen=seen + self._shared_tokens,
            seconds=time.perf_counter() - begin,
            actor_seconds=self._spent.seconds,
            computing_seconds=self._spent.computing,
        )

    def _warm(self, jobs: list[TrainJob], *, fresh: bool) -> list[TrainJob]:
        """The jobs as they are once the general adapter is there, which is trained if need be.

        Args:
            jobs: as they would be without it.
            fresh: whether it must be of the shards as they are now; otherwise the one that is
                there serves, as it served the experts that are not trained again.
        """
        experts = self.config.experts
        tokens = [self.clusters[job.id].tokens for job in jobs]
        if not fresh and (initial := adapter_in_place(jobs[0].root)) is not None:
            return start_from(initial, jobs, experts.shared_share)
        shared = shared_job(self.config, jobs, tokens)
        if shared.finished() is None:
            for event in run_experts(self.config, [shared], self._checkpoints, self._listen):
                if isinstance(event, ExpertFailed):
                    raise ExpertError(f"the shared adapter failed: {event.cause}")
                self._shared_tokens = event.outcome.tokens_seen
                self._on_event(event)
        return start_from(adapter_of(shared), jobs, experts.shared_share)

    def _listen(self, event: TrainEvent) -> None:
        if isinstance(event, PoolEnded):
            self._spent = PoolEnded(
                self._spent.seconds + event.seconds, self._spent.computing + event.computing
            )
        self._on_event(event)


def run_experts(
    config: RunConfig,
    jobs: Sequence[TrainJob],
    checkpoints: Storage,
    on_event: OnEvent,
    *,
    missing: Sequence[str] | None = None,
    keep_plan: bool = False,
) -> Iterator[JobFinished | ExpertFailed]:
    """Train jobs on the Ray cluster at hand, in cohorts; yields each one's end, good or bad.

    Args:
        config: the run.
        jobs: all of the run, those that are finished included: their place in a cohort counts.
        checkpoints: where cohorts keep what they need to go on after a crash.
        on_event: told of everything on the way but the good ends, which are the caller's to tell.
        missing: ids of those to train; default: all.
        keep_plan: keep who is trained with whom beside the checkpoints, or take the plan there.

    Raises:
        PoolError: the cluster cannot be reached or has not what the config asks for.
        BaseModelError: the base cannot be loaded.
    """
    from expert_trainer.pool import run_jobs
    from expert_trainer.runtime import await_nodes, ray_session

    missing = [job.id for job in jobs] if missing is None else missing
    if not missing:
        return
    experts = config.experts
    with ray_session():
        crew = plan_crew(len(missing), experts, await_nodes())
        device: Literal["cuda", "cpu"] = "cuda" if crew.share.gpus else "cpu"
        fused = auto_fused(experts, device) if experts.fused == "auto" else experts.fused
        place = checkpoints if keep_plan else None
        cohorts = group(jobs, missing, place=place, actors=crew.actors, fused=fused)
        work = [Cohort(members, checkpoints, experts.checkpoint_s) for members in cohorts]
        yield from run_jobs(work, config, on_event)


def expert_jobs(config: RunConfig, fit: FitSummary, base_digest: str) -> list[TrainJob]:
    """A job for every cluster that has any text, longest first."""
    work = Storage(config.bundle.work).absolute()
    planned = plan_jobs([cluster.tokens for cluster in fit.clusters], config.experts)
    clusters = [fit.clusters[plan.cluster] for plan in planned]
    tokenizer = tokenizer_digest(config.base)
    return [
        TrainJob(
            id=cluster.expert,
            shards=(fit.shard(work, cluster),),
            heldout=(fit.heldout(work, cluster),),
            heldout_limit=config.experts.heldout_tokens,
            steps=plan.steps,
            learning_rate=config.experts.learning_rate,
            seed=seed_of(config.seed, cluster.expert),
            experts=config.experts,
            base_digest=base_digest,
            tokenizer_digest=tokenizer,
            dtype=config.base.dtype,
            root=work / EXPERTS_DIR,
        )
        for plan, cluster in zip(planned, clusters, strict=True)
    ]


def make_card(cluster: FittedCluster, result: Result, config: RunConfig) -> ExpertCard:
    """An expert's card: its cluster, its training's result and the gate's verdict on it."""
    verdict = judge(
        result.heldout_loss_base, result.heldout_loss_expert, config.experts.gate_margin
    )
    measured = result.model_dump(exclude={"digest", "files"})
    return ExpertCard(
        **measured,
        id=cluster.expert,
        cluster=cluster.cluster,
        top_terms=cluster.top_terms,
        state=verdict.state,
        reason=verdict.reason,
    )


def base_entry(config: RunConfig) -> BaseEntry:
    """The run's base, as the manifest names it."""
    base = config.base
    return BaseEntry(
        name=base.served_name, model=base.model, revision=base.revision, digest=digest_of(base)
    )


def _published(config: RunConfig, base: BaseEntry) -> Bundle | None:
    """The bundle in place, of which all but the selected experts are kept; none if there is none.

    Raises:
        StaleBundleError: it is of another base or fit, so nothing of it can be kept.
    """
    try:
        bundle = open_published(config.bundle, verify=False)
    except NotPublishedError:
        return None
    router = router_version(Storage(config.bundle.work) / ROUTER_DIR)
    if bundle.manifest.base.digest != base.digest or bundle.manifest.router.version != router:
        raise StaleBundleError(
            f"{Storage(config.bundle.path)} is of another base or fit than this run, so its other "
            "experts cannot be kept; run `introvert train` without --only or --add-data"
        )
    return bundle


def _known(experts: Sequence[str], fit: FitSummary) -> frozenset[str]:
    there = [cluster.expert for cluster in fit.clusters if cluster.tokens]
    if unknown := sorted(set(experts).difference(there)):
        raise UnknownExpertError(
            f"there is no cluster for {', '.join(unknown)}; the experts are {there[0]} to "
            f"{there[-1]}, see `introvert experts list`"
        )
    return frozenset(experts)


def _outgrown(bundle: Bundle, fit: FitSummary, growth: Growth) -> frozenset[str]:
    """Experts whose clusters have grown, by this command or by one that was broken off."""
    grown = {cluster.expert for cluster in growth.clusters if cluster.grew}
    shards = {cluster.expert: cluster.shard_sha256 for cluster in fit.clusters}
    cards = bundle.cards(bundle.manifest.experts)
    return frozenset(grown | {card.id for card in cards if card.shards != [shards[card.id]]})
