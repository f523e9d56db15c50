"""Use case `fit`: corpus to a router and one shard of documents per cluster.

Writes below the work directory: `router/`, `shards/cluster-0007.jsonl`,
`shards/heldout-0007.jsonl`, `shards/test.jsonl` and, last, `fit.json`, without which the rest
counts for nothing. The corpus passes over local disk, never as a whole through memory: what is held
are a few dozen bytes a document, one block of documents, and the vectors that k-means is fitted on.
Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING

import numpy as np

from configs.schema import RunConfig
from expert_trainer.base import load_tokenizer, tokenizer_digest
from expert_trainer.clusters import (
    FIT_FILE,
    ROUTER_DIR,
    SHARDS_DIR,
    TEST_FILE,
    FitSummary,
    FittedCluster,
    Share,
    read_summary,
    sort_documents,
    store_clusters,
    store_shard,
    write_summary,
)
from expert_trainer.corpus import routed_text
from expert_trainer.embedding import (
    UNRENDERED,
    Embedded,
    clusters_on_gpu,
    embed,
    load_embedder_for,
)
from expert_trainer.errors import CorpusError, NotFittedError
from expert_trainer.gathering import Gathered, gather
from expert_trainer.places import require_places
from expert_trainer.rendering import Renderer, RenderError
from expert_trainer.sources import content_key, files_of
from expert_trainer.spool import Numbers, Spool, scratch_directory
from expert_trainer.storage import Storage
from expert_trainer.types import Document
from router.storage import RECORD_FILE
from router.types import OnProgress, ignore

if TYPE_CHECKING:
    from router.model import Fitted, Router

__all__ = [
    "FIT_FILE",
    "ROUTER_DIR",
    "SHARDS_DIR",
    "FitSummary",
    "FittedCluster",
    "ensure_fit",
    "fit",
    "fit_digest",
    "heldout_documents",
    "read_fit",
]

logger = logging.getLogger(__name__)


def fit(config: RunConfig, on_progress: OnProgress = ignore) -> FitSummary:
    """Fit the router and write the shards, whatever is there already.

    A document that the router would abstain on still trains in its nearest cluster. Documents that
    were added since an earlier fit are gone, unless their files are named in `data.train` now.

    Args:
        config: the run.
        on_progress: told each stage's name, done and total.

    Raises:
        PlaceError: the bundle's, the working or the scratch directory cannot be written to.
        CorpusError: data that cannot be read, or too many bad rows.
        RouterError: the texts cannot be clustered.
        PoolError: Ray, which embeds a large corpus, cannot be reached.
        StorageError: what the fit made cannot be written.
    """
    from router.model import Router

    require_places(config.bundle)
    digest = fit_digest(config)
    work = Storage(config.bundle.work)
    with scratch_directory(config.bundle.scratch) as scratch:
        gathered = gather(config.data, config.seed, scratch / "spool", on_progress)
        test = _rendering(gathered, config)
        _require_enough(gathered, config)
        embedder = load_embedder_for(len(gathered.train) + len(gathered.heldout), config.router)
        order = np.concatenate([gathered.train, gathered.heldout])
        embedded = embed(
            gathered.spool, order, config, scratch, embedder=embedder, on_progress=on_progress
        )
        order, embedded, trained = _without_faults(gathered, order, embedded)
        gathered.report.check(config.data.max_bad_share)
        on_progress("clustering", 0, 1)
        fitted = Router.fit(
            embedded.vectors[:trained],
            embedded.vectors[trained:],
            config.router,
            seed=config.seed,
            embedder=embedder,
            use_gpu=clusters_on_gpu(config.router),
        )
        on_progress("clustering", 1, 1)
        router = _made_fast(
            fitted, gathered.spool, order, embedded, config=config, on_progress=on_progress
        )
        train = Share(order[:trained], embedded.tokens[:trained], fitted.assignment)
        heldout = Share(order[trained:], embedded.tokens[trained:], fitted.heldout_assignment)
        sorted_ = scratch / SHARDS_DIR
        everywhere = sort_documents(gathered.spool, train, heldout, test, sorted_)
        router.save(scratch / ROUTER_DIR)
        # Whoever is interrupted from here on leaves no `fit.json`, so no fit.
        for name in (FIT_FILE, SHARDS_DIR):
            work.remove(name)
        work.put_tree(scratch / ROUTER_DIR, ROUTER_DIR, marker=RECORD_FILE)
        clusters = store_clusters(
            sorted_,
            work,
            train=train,
            heldout=heldout,
            everywhere=everywhere,
            count=router.clusters,
            on_progress=on_progress,
        )
        summary = FitSummary(
            digest=digest,
            clusters=clusters,
            documents=len(train.numbers),
            tokens=sum(cluster.tokens for cluster in clusters),
            heldout_documents=len(heldout.numbers),
            test_documents=len(test),
            test_sha256=store_shard(sorted_, TEST_FILE, work),
            rows=gathered.report.rows,
            bad_rows=gathered.report.bad,
            duplicates=gathered.report.duplicates,
            near_duplicates=gathered.report.near_duplicates,
            faults=gathered.report.faults,
        )
        write_summary(work, summary)
    return summary


def ensure_fit(config: RunConfig, on_progress: OnProgress = ignore) -> FitSummary:
    """The fit of this config and data: the one that is there, or else a new one."""
    try:
        return read_fit(config)
    except NotFittedError as reason:
        logger.info("%s", reason)
        return fit(config, on_progress)


def read_fit(config: RunConfig) -> FitSummary:
    """The fit that is there.

    Raises:
        NotFittedError: there is none, or the data, the router's settings, the tokenizer or the
            seed are not those it was made with.
    """
    work = Storage(config.bundle.work)
    summary = read_summary(work)
    if summary.digest != fit_digest(config):
        raise NotFittedError(
            f"{work}/{FIT_FILE} belongs to other data or another config; run `introvert fit` again"
        )
    return summary


def fit_digest(config: RunConfig) -> str:
    """Hash of what a fit depends on: data and its section, router section, tokenizer, seed.

    Files count by their content, what lies behind URLs by what the store tells of it, hub data
    sets by their name.
    """
    data = config.data
    sources = [*data.train, *data.valid, *data.test]
    inputs = {
        "contents": [content_key(file) for source in sources for file in files_of(source)],
        "data": data.model_dump(mode="json"),
        "router": config.router.model_dump(mode="json"),
        "tokenizer": tokenizer_digest(config.base),
        "seed": config.seed,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def heldout_documents(config: RunConfig, summary: FitSummary) -> tuple[str, list[Document]]:
    """What to evaluate on: the split's name, `test` or `valid`, and its documents.

    Raises:
        CorpusError: there are none.
        ExpertError: a shard is missing or was changed after the fit.
    """
    work = Storage(config.bundle.work)
    if config.data.test:
        split, shards = "test", [summary.test(work)]
    else:
        split, shards = "valid", [summary.heldout(work, cluster) for cluster in summary.clusters]
    documents = [document for shard in shards for document in shard.documents()]
    if not documents:
        raise CorpusError(f"data.{split} has no document to evaluate on; name some in data.test")
    return split, documents


def _rendering(gathered: Gathered, config: RunConfig) -> Numbers:
    """The test documents that can be rendered; the others are bad rows."""
    renderer = Renderer(load_tokenizer(config.base))
    good = np.ones(len(gathered.test), dtype=np.bool_)
    for place, document in enumerate(gathered.spool.documents(gathered.test)):
        try:
            renderer.render(document)
        except RenderError as error:
            gathered.report.note(document.id, str(error))
            good[place] = False
    return gathered.test[good]


def _made_fast(
    fitted: Fitted,
    spool: Spool,
    order: Numbers,
    embedded: Embedded,
    *,
    config: RunConfig,
    on_progress: OnProgress,
) -> Router:
    """The fitted router with what makes it fast, as far as there are enough texts for it: what 8
    bits do to its embedder is measured, and a student taught, if asked for."""
    from router.distillation import LEAST_DOCUMENTS, Texts

    if len(fitted.assignment) < LEAST_DOCUMENTS:
        return fitted.router

    def texts(part: slice) -> Texts:
        numbers = order[part]

        def read(rows: Numbers) -> list[str]:
            documents = spool.documents(numbers[rows])
            return [routed_text(document, config.router.route_on) for document in documents]

        return Texts(embedded.vectors[part], read)

    trained = len(fitted.assignment)
    router, train, heldout = fitted.router, texts(slice(trained)), texts(slice(trained, None))
    if config.router.quantized_agreement is not None:
        on_progress("quantizing", 0, 1)
        router = router.quantized(train, heldout)
        on_progress("quantizing", 1, 1)
    if config.router.student:
        router = router.taught(train, heldout, on_progress)
    return router


def _require_enough(gathered: Gathered, config: RunConfig) -> None:
    """Embedding is nearly all of the time: what must fail for want of texts fails before it.

    Raises:
        ClusteringError: fewer distinct texts than clusters.
        CalibrationError: no held-out text to calibrate on.
    """
    from router.calibration import abstention_threshold
    from router.clustering import require_distinct

    documents = gathered.spool.documents(gathered.train)
    texts = (routed_text(document, config.router.route_on) for document in documents)
    require_distinct((hash(text) for text in texts), config.router.clusters)
    if not gathered.heldout.size:
        abstention_threshold([], config.router.abstain_quantile)


def _without_faults(
    gathered: Gathered, order: Numbers, embedded: Embedded
) -> tuple[Numbers, Embedded, int]:
    """Count what cannot be rendered as bad rows and leave it out.

    Returns:
        What is left of `order` and `embedded`, and how many of it are trained on.
    """
    for place, fault in embedded.faults.items():
        (document,) = gathered.spool.documents([int(order[place])])
        gathered.report.note(document.id, fault)
    good = embedded.tokens != UNRENDERED
    return order[good], embedded.compact(), int(good[: len(gathered.train)].sum())
