"""Use case `add`: new documents to the clusters of a fit that stands.

New documents of a cluster wait in `shards/added-0007.jsonl` until there are enough of them to
train its expert again; then they become part of its shard, under a new name. `fit.json` is replaced
once, after all new files are there and before any old one goes, so whoever is interrupted has lost
nothing, and the same command again adds nothing twice. Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.manifest import expert_id
from configs.schema import RunConfig
from expert_trainer.clusters import (
    ROUTER_DIR,
    SHARDS_DIR,
    FitSummary,
    FittedCluster,
    with_masses,
    write_summary,
)
from expert_trainer.corpus import CorpusReport, from_row, read_documents
from expert_trainer.embedding import UNRENDERED, embed, load_embedder_for
from expert_trainer.fitting import read_fit
from expert_trainer.gathering import without_copies
from expert_trainer.shards import Shard, row_bytes
from expert_trainer.spool import Numbers, Spool, SpoolWriter, scratch_directory
from expert_trainer.storage import Storage
from expert_trainer.types import Document
from router.types import OnProgress, ignore

_TOKENS = "tokens"
_NAME_DIGITS = 12


@dataclass(frozen=True)
class ClusterGrowth:
    """What new documents did to one cluster."""

    cluster: int
    documents: int
    """New documents of this call."""
    tokens: int
    """Their tokens."""
    pending_tokens: int
    """Tokens that wait after this call, those of earlier calls included; 0 if it grew."""
    grew: bool
    """All that waited is part of the shard now, so the expert is to be trained again."""

    @property
    def expert(self) -> str:
        """Id of the cluster's expert."""
        return expert_id(self.cluster)


@dataclass(frozen=True)
class Growth:
    """What adding documents came to."""

    clusters: tuple[ClusterGrowth, ...]
    """Clusters that have new documents or documents waiting, by number."""
    report: CorpusReport
    """Rows read, bad ones, and copies of each other or of what is there."""
    fit: FitSummary
    """The fit as it is now."""


@dataclass(frozen=True)
class _Addition:
    """Documents with their token counts, as an `added` file holds them."""

    documents: tuple[Document, ...]
    tokens: tuple[int, ...]

    @classmethod
    def parse(cls, content: bytes) -> _Addition:
        rows = [json.loads(line) for line in content.splitlines()]
        return cls(tuple(map(from_row, rows)), tuple(row[_TOKENS] for row in rows))

    @property
    def content(self) -> bytes:
        pairs = zip(self.documents, self.tokens, strict=True)
        return b"".join(row_bytes(document, tokens=tokens) for document, tokens in pairs)

    def __add__(self, other: _Addition) -> _Addition:
        return _Addition(self.documents + other.documents, self.tokens + other.tokens)


_NOTHING = _Addition((), ())


def add_documents(
    config: RunConfig,
    sources: Sequence[str],
    on_progress: OnProgress = ignore,
    *,
    fit: FitSummary | None = None,
) -> Growth:
    """Route new documents and add them to their clusters.

    They are read by the rules of `data.train`. Copies, exact and near, go: of one another, of what
    is held out, and of what their cluster has. Each goes to its nearest cluster, abstention aside.
    Where those that wait have more than `experts.retrain_growth` times the tokens of the shard,
    they become part of it. Nobody else may be at work in the run's directory meanwhile.

    Args:
        config: a run that has been fitted.
        sources: paths, globs, URLs or hub data sets, as in `data.train`.
        on_progress: told each stage's name, done and total.
        fit: the fit of this config and data, where the caller has just read it.

    Raises:
        NotFittedError: there is no fit of this config and data.
        CorpusError: data that cannot be read, or too many bad rows; nothing is added then.
        ExpertError: a shard is missing or was changed after the fit.
        StorageError: a file cannot be read or written.
    """
    fit = read_fit(config) if fit is None else fit
    work = Storage(config.bundle.work)
    _clean(work, fit)
    with scratch_directory(config.bundle.scratch) as scratch:
        adding = _Adding(config, work, fit, scratch, on_progress)
        additions = adding.by_cluster(sources)
        waiting = _waiting(work)
        grown = [
            adding.add(cluster, additions.get(cluster, _NOTHING), waits=cluster in waiting)
            for cluster in sorted(additions.keys() | waiting)
        ]
    if any(cluster.grew for cluster in grown):
        fit = _with_clusters(fit, adding.clusters)
        write_summary(work, fit)
        _clean(work, fit)
    changed = tuple(cluster for cluster in grown if cluster.documents or cluster.pending_tokens)
    return Growth(changed, adding.report, fit)


class _Adding:
    """One call of `add_documents`; `clusters` is what `fit.json` is to say at its end."""

    def __init__(
        self,
        config: RunConfig,
        work: Storage,
        fit: FitSummary,
        scratch: Path,
        on_progress: OnProgress,
    ) -> None:
        self._config, self._work, self._fit = config, work, fit
        self._scratch, self._on_progress = scratch, on_progress
        self.report = CorpusReport()
        self.clusters = list(fit.clusters)

    def by_cluster(self, sources: Sequence[str]) -> dict[int, _Addition]:
        """New documents and their tokens, by nearest cluster."""
        from router.model import Router

        spool, new = self._read(sources)
        self._work.get_tree(ROUTER_DIR, self._scratch / ROUTER_DIR)
        embedder = load_embedder_for(len(new), self._config.router)
        router = Router.load(self._scratch / ROUTER_DIR, embedder=embedder)
        embedded = embed(
            spool,
            new,
            self._config,
            self._scratch,
            embedder=embedder,
            on_progress=self._on_progress,
        )
        for place, fault in embedded.faults.items():
            (document,) = spool.documents([int(new[place])])
            self.report.note(document.id, fault)
        self.report.check(self._config.data.max_bad_share)
        new = new[embedded.tokens != UNRENDERED]
        embedded = embedded.compact()
        assigned = router.assign(embedded.vectors)
        return {
            int(cluster): _Addition(
                tuple(spool.documents(new[assigned == cluster])),
                tuple(embedded.tokens[assigned == cluster].tolist()),
            )
            for cluster in np.unique(assigned)
        }

    def add(self, cluster: int, addition: _Addition, *, waits: bool) -> ClusterGrowth:
        """Put a cluster's new documents with those that wait, and all into its shard if enough."""
        old = self.clusters[cluster]
        pending = _Addition.parse(self._work.read(_added(cluster))) if waits else _NOTHING
        addition = self._without_known(old, pending, addition)
        pending += addition
        if addition.documents:
            self._work.write(_added(cluster), pending.content)
        size = sum(pending.tokens)
        grew = size > self._config.experts.retrain_growth * old.tokens
        if grew:
            self.clusters[cluster] = _merge(self._work, self._fit, old, pending)
        return ClusterGrowth(
            cluster=cluster,
            documents=len(addition.documents),
            tokens=sum(addition.tokens),
            pending_tokens=0 if grew else size,
            grew=grew,
        )

    def _read(self, sources: Sequence[str]) -> tuple[Spool, Numbers]:
        """The new documents that are copies neither of one another nor of what is held out."""
        data = self._config.data
        self._on_progress("reading", 0, 1)
        with SpoolWriter(self._scratch / "new") as writer:
            for shard in self._heldout():
                writer.extend(shard.documents())
            new = writer.extend(read_documents(sources, data, self.report))
        self.report.check(data.max_bad_share)
        self._on_progress("reading", 1, 1)
        standing = without_copies(writer.spool, data.near_duplicate, self.report, self._on_progress)
        return writer.spool, new[standing[new]]

    def _heldout(self) -> Iterator[Shard]:
        yield self._fit.test(self._work)
        for cluster in self._fit.clusters:
            yield self._fit.heldout(self._work, cluster)

    def _without_known(
        self, cluster: FittedCluster, pending: _Addition, addition: _Addition
    ) -> _Addition:
        """The documents that are no copies of what their cluster has; counts those that go."""
        if not addition.documents:
            return addition
        with SpoolWriter(self._scratch / "known") as writer:
            writer.extend(self._fit.shard(self._work, cluster).documents())
            writer.extend(pending.documents)
            new = writer.extend(addition.documents)
        found = CorpusReport()
        standing = without_copies(writer.spool, self._config.data.near_duplicate, found, ignore)
        self.report.duplicates += found.duplicates
        self.report.near_duplicates += found.near_duplicates
        kept = np.flatnonzero(standing[new]).tolist()
        return _Addition(
            tuple(addition.documents[place] for place in kept),
            tuple(addition.tokens[place] for place in kept),
        )


def _merge(
    work: Storage, fit: FitSummary, cluster: FittedCluster, pending: _Addition
) -> FittedCluster:
    """Write the cluster's shard with what waited, beside the old one; what `fit.json` is to say."""
    content = fit.shard(work, cluster).read() + b"".join(map(row_bytes, pending.documents))
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"cluster-{cluster.cluster:04d}-{sha256[:_NAME_DIGITS]}.jsonl"
    work.write(f"{SHARDS_DIR}/{name}", content)
    return cluster.model_copy(
        update={
            "documents": cluster.documents + len(pending.documents),
            "tokens": cluster.tokens + sum(pending.tokens),
            "shard_file": name,
            "shard_sha256": sha256,
            "merged_sha256": hashlib.sha256(pending.content).hexdigest(),
        }
    )


def _with_clusters(fit: FitSummary, clusters: Sequence[FittedCluster]) -> FitSummary:
    return fit.model_copy(
        update={
            "clusters": with_masses(clusters),
            "documents": sum(cluster.documents for cluster in clusters),
            "tokens": sum(cluster.tokens for cluster in clusters),
        }
    )


def _clean(work: Storage, fit: FitSummary) -> None:
    """Remove what a call has made superfluous, this one or one that was interrupted."""
    named = {cluster.shard_file for cluster in fit.clusters}
    for name in work.names(SHARDS_DIR):
        if name.startswith("cluster-") and name not in named:
            work.remove(f"{SHARDS_DIR}/{name}")
    for number in _waiting(work):
        merged = fit.clusters[number].merged_sha256
        if merged == hashlib.sha256(work.read(_added(number))).hexdigest():
            work.remove(_added(number))


def _waiting(work: Storage) -> set[int]:
    """Clusters that have documents waiting."""
    names = (name for name in work.names(SHARDS_DIR) if name.startswith("added-"))
    return {int(name.removeprefix("added-").removesuffix(".jsonl")) for name in names}


def _added(cluster: int) -> str:
    return f"{SHARDS_DIR}/added-{cluster:04d}.jsonl"
