"""What a fit leaves behind: `fit.json` and the shards that it names.

Knows nothing of how documents came to their clusters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from configs.manifest import Record, Sha256, expert_id
from expert_trainer.corpus import from_row, full_text
from expert_trainer.errors import NotFittedError
from expert_trainer.shards import Shard, Sorter
from expert_trainer.spool import Numbers, Spool
from expert_trainer.storage import Storage
from expert_trainer.terms import WordCounts, top_terms
from router.types import OnProgress

FIT_FILE = "fit.json"
ROUTER_DIR, SHARDS_DIR = "router", "shards"
TEST_FILE = "test.jsonl"

Ints = npt.NDArray[np.int64]


class FittedCluster(Record):
    """One cluster as the fit, or documents added since, left it."""

    cluster: int
    documents: int
    tokens: int
    heldout_documents: int
    heldout_tokens: int
    mass: float
    """Share of the corpus' training tokens."""
    top_terms: list[str]
    shard_file: str
    """Name of its training documents' file; a cluster that has grown has a new one."""
    shard_sha256: Sha256
    heldout_sha256: Sha256
    merged_sha256: Sha256 | None = None
    """Hash of the additions that became part of the shard last."""

    @property
    def expert(self) -> str:
        """Id of the cluster's expert."""
        return expert_id(self.cluster)


class FitSummary(Record):
    """What a fit made: the content of `fit.json`."""

    digest: Sha256
    """Hash of all that the fit depends on."""
    clusters: list[FittedCluster]
    documents: int
    tokens: int
    heldout_documents: int
    test_documents: int
    test_sha256: Sha256
    rows: int
    """Rows read, the bad ones and duplicates included."""
    bad_rows: int
    duplicates: int
    """Documents left out as exact copies."""
    near_duplicates: int
    """Documents left out because they are nearly the same as others."""
    faults: list[str]
    """The first bad rows, FILE:LINE and why."""

    def shard(self, work: Storage, cluster: FittedCluster) -> Shard:
        """A cluster's training documents."""
        return Shard((work / SHARDS_DIR).absolute(), cluster.shard_file, cluster.shard_sha256)

    def heldout(self, work: Storage, cluster: FittedCluster) -> Shard:
        """A cluster's held-out documents."""
        name = heldout_file(cluster.cluster)
        return Shard((work / SHARDS_DIR).absolute(), name, cluster.heldout_sha256)

    def test(self, work: Storage) -> Shard:
        """The documents held out for evaluation."""
        return Shard((work / SHARDS_DIR).absolute(), TEST_FILE, self.test_sha256)


def read_summary(work: Storage) -> FitSummary:
    """The fit in a work directory, whatever it was made from.

    Raises:
        NotFittedError: there is none, or one that this version cannot read.
        StorageError: the directory cannot be read.
    """
    try:
        return FitSummary.model_validate_json(work.read(FIT_FILE))
    except (FileNotFoundError, ValidationError):
        raise NotFittedError(f"{work}/{FIT_FILE} is not there; run `introvert fit` first") from None


def write_summary(work: Storage, summary: FitSummary) -> None:
    """Put `fit.json` there, at once in place of the one before."""
    work.write(FIT_FILE, (summary.model_dump_json(indent=1) + "\n").encode())


def cluster_file(cluster: int) -> str:
    """Name of a cluster's shard as the fit wrote it."""
    return f"cluster-{cluster:04d}.jsonl"


def heldout_file(cluster: int) -> str:
    """Name of the shard of a cluster's held-out documents."""
    return f"heldout-{cluster:04d}.jsonl"


def file_hash(path: Path) -> str:
    """Hash of a local file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Share:
    """Some documents of a spool with their token counts and their clusters, row by row."""

    def __init__(self, numbers: Numbers, tokens: npt.NDArray[np.int32], clusters: Ints) -> None:
        self.numbers, self.tokens, self.clusters = numbers, tokens, clusters

    def documents_of(self, count: int) -> list[int]:
        """Documents in each of `count` clusters."""
        found: list[int] = np.bincount(self.clusters, minlength=count).tolist()
        return found

    def tokens_of(self, count: int) -> list[int]:
        """Tokens in each of `count` clusters."""
        sums = np.bincount(self.clusters, weights=self.tokens, minlength=count)
        found: list[int] = sums.astype(np.int64).tolist()
        return found


def sort_documents(
    spool: Spool, train: Share, heldout: Share, test: Numbers, directory: Path
) -> WordCounts:
    """Write the shards of all clusters and of the test documents into a local directory.

    Files of what has no documents are left out.

    Returns:
        The words of all training documents.
    """
    shards = np.full(len(spool), -1, dtype=np.int64)
    shards[train.numbers] = 2 * train.clusters
    shards[heldout.numbers] = 2 * heldout.clusters + 1
    everywhere = WordCounts()
    with Sorter(directory) as sorter:
        wanted = np.flatnonzero(shards >= 0)
        for shard, line in zip(shards[wanted], spool.lines(wanted), strict=True):
            cluster, held_out = divmod(int(shard), 2)
            if held_out:
                sorter.put(heldout_file(cluster), line)
            else:
                sorter.put(cluster_file(cluster), line)
                everywhere.add(full_text(from_row(json.loads(line))))
        for line in spool.lines(test):
            sorter.put(TEST_FILE, line)
    return everywhere


def store_clusters(
    directory: Path,
    work: Storage,
    *,
    train: Share,
    heldout: Share,
    everywhere: WordCounts,
    count: int,
    on_progress: OnProgress,
) -> list[FittedCluster]:
    """Put sorted shards where all nodes reach them; an empty cluster gets empty ones.

    Args:
        directory: what `sort_documents` filled.
        work: the work directory.
        train: the training documents.
        heldout: the held-out documents.
        everywhere: what `sort_documents` returned.
        count: number of clusters.
        on_progress: told the stage `writing`, clusters done and their total.
    """
    documents, tokens = train.documents_of(count), train.tokens_of(count)
    held_documents, held_tokens = heldout.documents_of(count), heldout.tokens_of(count)
    total = sum(tokens)
    clusters = []
    for cluster in range(count):
        on_progress("writing", cluster, count)
        name = cluster_file(cluster)
        terms = _terms(directory / name, everywhere)
        clusters.append(
            FittedCluster(
                cluster=cluster,
                documents=documents[cluster],
                tokens=tokens[cluster],
                heldout_documents=held_documents[cluster],
                heldout_tokens=held_tokens[cluster],
                mass=tokens[cluster] / total,
                top_terms=terms,
                shard_file=name,
                shard_sha256=store_shard(directory, name, work),
                heldout_sha256=store_shard(directory, heldout_file(cluster), work),
            )
        )
    on_progress("writing", count, count)
    return clusters


def store_shard(directory: Path, name: str, work: Storage) -> str:
    """Put a local file, or an empty one where there is none, among the shards; returns its hash."""
    path = directory / name
    path.touch()
    work.put_file(path, f"{SHARDS_DIR}/{name}")
    return file_hash(path)


def with_masses(clusters: Sequence[FittedCluster]) -> list[FittedCluster]:
    """The clusters, each with its share of all their tokens."""
    total = sum(cluster.tokens for cluster in clusters)
    return [cluster.model_copy(update={"mass": cluster.tokens / total}) for cluster in clusters]


def _terms(path: Path, everywhere: WordCounts) -> list[str]:
    if not path.exists():
        return []
    with path.open("rb") as lines:
        words = WordCounts(full_text(from_row(json.loads(line))) for line in lines)
    return top_terms(words, everywhere)
