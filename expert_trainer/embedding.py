"""Documents on disk to vectors on disk, their tokens counted on the way.

A large corpus goes through a Ray Data pipeline: blocks of documents are read on this machine, sent
to a pool of actors wherever the cluster has room, and come back as vectors, never more of them on
the way than the object store holds. So nodes need no common disk. A small corpus is not worth the
seconds that actors take to start, and goes through the same function here. Knows nothing of
clusters.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import IntrovertError
from configs.schema import RouterConfig, RunConfig
from expert_trainer.arrays import allocate
from expert_trainer.base import load_tokenizer
from expert_trainer.corpus import from_row, routed_text
from expert_trainer.errors import PoolError
from expert_trainer.rendering import Renderer, RenderError
from expert_trainer.spool import Numbers, Spool
from router.embedder import Embedder, load_embedder, resolve_device
from router.types import OnProgress

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

UNRENDERED = -1
"""Token count of a document that gives the model nothing to learn."""
BLOCK_DOCUMENTS = 1024
BLOCK_BYTES = 4 << 20
"""Documents and bytes after which a block is full. Blocks are cut by the documents alone, so that
vectors, which in their last digits depend on what they are batched with, are the same whoever
makes them."""
RAY_FROM_DOCUMENTS = 20_000
"""Documents from which a Ray of our own is worth starting."""
_READERS = 2
_VECTORS_FILE = "vectors"


@dataclass(frozen=True)
class Embedded:
    """What the documents of an `embed` came to, in its order."""

    vectors: Floats
    """Shape (N, D), rows of unit length, memory-mapped."""
    tokens: Ints
    """Tokens of each, shape (N,); UNRENDERED for those that cannot be rendered."""
    faults: dict[int, str]
    """Why, for each of those."""

    def compact(self) -> Embedded:
        """The same without those that cannot be rendered; gives up this one's vectors."""
        if not self.faults:
            return self
        kept = np.flatnonzero(self.tokens != UNRENDERED)
        for start in range(0, len(kept), BLOCK_DOCUMENTS):
            rows = kept[start : start + BLOCK_DOCUMENTS]
            self.vectors[start : start + len(rows)] = self.vectors[rows]
        return Embedded(self.vectors[: len(kept)], self.tokens[kept], {})


@dataclass(frozen=True)
class _Block:
    """Vectors and token counts of a few documents, and what kept any from being rendered."""

    vectors: Floats
    tokens: Ints
    faults: dict[int, str]


def embed(
    spool: Spool,
    numbers: Numbers,
    config: RunConfig,
    directory: Path,
    *,
    embedder: Embedder,
    on_progress: OnProgress,
) -> Embedded:
    """Embed what the router sees of some documents, and count their tokens.

    Args:
        spool: the documents.
        numbers: which of them, in which order.
        config: embedder, base, and what of a chat is routed on.
        directory: for the vectors' file; whoever made it removes it.
        embedder: does the work where that is done here.
        on_progress: told the stage `embedding`, documents done and their total.

    Raises:
        BaseModelError: chats, and the base's tokenizer has no chat template.
        RouterError: the embedder cannot be loaded where the work is done.
        PoolError: Ray cannot be reached, or the work failed there.
    """
    shape = (len(numbers), embedder.dimension)
    vectors: Floats = allocate(directory / _VECTORS_FILE, np.float32, shape)
    tokens = np.zeros(len(numbers), dtype=np.int32)
    faults: dict[int, str] = {}
    blocks = plan_blocks(spool, numbers)
    done = 0
    on_progress("embedding", 0, len(numbers))
    elsewhere = bool(blocks) and wants_ray(len(numbers))
    work = _with_ray if elsewhere else partial(_here, embedder=embedder)
    for index, block in work(spool, numbers, blocks, config):
        begin, end = blocks[index]
        vectors[begin:end], tokens[begin:end] = block.vectors, block.tokens
        faults.update({begin + place: fault for place, fault in block.faults.items()})
        done += end - begin
        on_progress("embedding", done, len(numbers))
    return Embedded(vectors, tokens, dict(sorted(faults.items())))


def load_embedder_for(documents: int, config: RouterConfig) -> Embedder:
    """The embedder for this process: on its device if that many documents are embedded here.

    Raises:
        EmbedderNotFoundError: the embedding model cannot be loaded.
        RouterError: a GPU is asked for and there is none.
    """
    return load_embedder(
        config.embedder,
        device="cpu" if wants_ray(documents) else config.device,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
    )


def clusters_on_gpu(config: RouterConfig) -> bool:
    """Whether k-means of this process runs on a GPU."""
    return config.device != "cpu" and resolve_device("auto") == "cuda"


def wants_ray(documents: int) -> bool:
    """Whether that many documents go to Ray: many, or any where a cluster is there already."""
    ray = sys.modules.get("ray")
    connected = ray is not None and ray.is_initialized()
    return documents >= RAY_FROM_DOCUMENTS or connected or "RAY_ADDRESS" in os.environ


def plan_blocks(spool: Spool, numbers: Numbers) -> list[tuple[int, int]]:
    """Where each block of `numbers` begins and ends."""
    offsets = spool.offsets
    ends, size, begin = [], 0, 0
    for place, number in enumerate(numbers):
        length = int(offsets[number + 1] - offsets[number])
        if place > begin and (size + length > BLOCK_BYTES or place - begin == BLOCK_DOCUMENTS):
            ends.append(place)
            begin, size = place, 0
        size += length
    ends += [len(numbers)] if len(numbers) else []
    return list(pairwise([0, *ends]))


class BlockWorker:
    """Embeds blocks of documents and counts their tokens."""

    def __init__(self, config: RunConfig, embedder: Embedder | None = None) -> None:
        router = config.router
        self._route_on = router.route_on
        self._renderer = Renderer(load_tokenizer(config.base))
        self._embedder = embedder or load_embedder(
            router.embedder,
            device=router.device,
            batch_size=router.batch_size,
            max_tokens=router.max_tokens,
        )

    def work(self, lines: Iterable[bytes]) -> _Block:
        """Rows as JSON lines to vectors and token counts, in their order."""
        documents = [from_row(json.loads(line)) for line in lines]
        tokens = np.full(len(documents), UNRENDERED, dtype=np.int32)
        faults: dict[int, str] = {}
        for place, document in enumerate(documents):
            try:
                tokens[place] = len(self._renderer.render(document).token_ids)
            except RenderError as error:
                faults[place] = str(error)
        texts = [routed_text(document, self._route_on) for document in documents]
        return _Block(self._embedder.encode(texts), tokens, faults)


def _here(
    spool: Spool,
    numbers: Numbers,
    blocks: Sequence[tuple[int, int]],
    config: RunConfig,
    *,
    embedder: Embedder,
) -> Iterator[tuple[int, _Block]]:
    worker = BlockWorker(config, embedder)
    for index, (begin, end) in enumerate(blocks):
        yield index, worker.work(spool.lines(numbers[begin:end]))


def _with_ray(
    spool: Spool, numbers: Numbers, blocks: Sequence[tuple[int, int]], config: RunConfig
) -> Iterator[tuple[int, _Block]]:
    """Blocks in the order they get done."""
    import ray
    import ray.data

    from expert_trainer.runtime import ray_session

    with ray_session(), ray.data.DataContext.current(_quiet_context()):
        size, gpus = _pool(config.router.device, len(blocks))
        here = ray.get_runtime_context().get_node_id()
        items = [
            {"index": index, "numbers": numbers[begin:end].tobytes()}
            for index, (begin, end) in enumerate(blocks)
        ]
        results = (
            # As many Ray Data blocks as ours, so that none is merged with another.
            ray.data.from_items(items, override_num_blocks=len(items))
            # Reading takes no core: the actors hold them all, and would wait for it forever.
            .map(
                partial(_read_block, spool=spool),
                compute=ray.data.TaskPoolStrategy(size=_READERS),
                num_cpus=0,
                label_selector={"ray.io/node-id": here},
            )
            .map_batches(
                _Actor,
                fn_constructor_args=(config.model_dump_json(),),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=size),
                num_cpus=1,
                num_gpus=gpus,
            )
        )
        try:
            # With prefetching a thread of Ray Data holds blocks as long as it lives, maybe beyond
            # Ray's shutdown; who uses Ray's worker after that ends this process, exit code 1.
            for batch in results.iter_batches(batch_size=1, prefetch_batches=0):
                row = {name: column[0] for name, column in batch.items()}
                yield int(row["index"]), _unpacked(row)
        except ray.exceptions.RayError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise PoolError(
                f"embedding on Ray failed: {reason}; see that its nodes have this project "
                "installed, the embedder and the base, then give the same command again"
            ) from error


class _Actor:
    """A `BlockWorker` as Ray Data calls it."""

    def __init__(self, config: str) -> None:
        self._config = RunConfig.model_validate_json(config)
        self._worker: BlockWorker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One block a call, packed; an error for the user travels as data, being no crash."""
        (lines,) = batch["lines"]
        try:
            # Not made in the constructor, whose errors Ray takes for a reason to try again.
            self._worker = self._worker or BlockWorker(self._config)
            block = self._worker.work(lines.splitlines())
        except IntrovertError as error:
            return _packed(batch["index"], b"", b"", {}, str(error))
        return _packed(
            batch["index"], block.vectors.tobytes(), block.tokens.tobytes(), block.faults, ""
        )


def _packed(
    index: Any, vectors: bytes, tokens: bytes, faults: dict[int, str], error: str
) -> dict[str, Any]:
    def one(value: object) -> npt.NDArray[np.object_]:
        return np.array([value], dtype=np.object_)

    return {
        "index": index,
        "vectors": one(vectors),
        "tokens": one(tokens),
        "faults": one(json.dumps(list(faults.items()))),
        "error": one(error),
    }


def _unpacked(row: dict[str, Any]) -> _Block:
    if row["error"]:
        raise PoolError(f"embedding on Ray failed: {row['error']}")
    tokens = np.frombuffer(row["tokens"], dtype=np.int32)
    vectors = np.frombuffer(row["vectors"], dtype=np.float32).reshape(len(tokens), -1)
    return _Block(vectors, tokens, dict(json.loads(row["faults"])))


def _read_block(row: dict[str, Any], spool: Spool) -> dict[str, Any]:
    numbers = np.frombuffer(row["numbers"], dtype=np.int64)
    return {"index": row["index"], "lines": b"".join(spool.lines(numbers))}


def _pool(device: str, blocks: int) -> tuple[int, int]:
    """Actors, and GPUs of each: one each where the cluster has GPUs, else a core each.

    Raises:
        PoolError: a GPU is asked for and the cluster has none.
    """
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    if device == "cuda" and not gpus:
        raise PoolError(
            "router.device is 'cuda' but no node of the Ray cluster has a GPU; set it to 'auto'"
        )
    on_gpus = gpus > 0 and device != "cpu"
    most = min(gpus, cores) if on_gpus else cores
    return max(1, min(most, blocks)), int(on_gpus)


def _quiet_context() -> Any:
    """Ray Data's settings: blocks as we cut them, and nothing on the user's terminal."""
    import logging

    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context
