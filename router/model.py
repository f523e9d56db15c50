"""The router: text to expert, abstention included.

Knows nothing of HTTP, language models or what becomes of an expert that it names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.manifest import expert_id
from configs.schema import RouterConfig, Runtime
from router.calibration import Calibration, calibrate, doubted_below
from router.cascade import Cascade, Guesser, StudentRecord
from router.clustering import CentroidIndex, fit_clusters, limit_threads, nearest_centroids
from router.conversation import Message, opening_text, routing_text
from router.distillation import Texts, distil
from router.embedder import Embedder, SentenceEmbedder
from router.errors import ExportError, RouterFormatError
from router.guess import Guess
from router.onnx_embedder import OnnxEmbedder
from router.quantization import ROUNDING, levels_here
from router.serving_embedder import require_digest, serving_embedder
from router.storage import (
    ENCODER_FILE,
    REMEDY,
    STUDENT_FILE,
    Quantized,
    RouterRecord,
    read_router,
    read_student,
    write_router,
)
from router.types import Candidate, Decider, OnProgress, Route, ignore

logger = logging.getLogger(__name__)

MOST_MEASURED = 4000
"""Held-out texts to measure the embedder in 8 bits on."""
ENOUGH_MEASURED = 2000
"""Where there are fewer, they are filled up to so many from those of the fit."""

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A router with the clusters of the texts it was fitted on."""

    router: Router
    assignment: Indices
    """Cluster of each training text, shape (N,); balanced where the config says so."""
    heldout_assignment: Indices
    """Nearest cluster of each held-out text, shape (M,)."""


class Router:
    """Centroids of meaning and the threshold below which a text has no expert.

    Of a text that is longer than `max_tokens` only the beginning counts, in fitting as in routing.
    With a student, what that is sure of needs no embedder.
    """

    def __init__(
        self,
        record: RouterRecord,
        centroids: Vectors,
        embedder: Embedder,
        cascade: Cascade | None = None,
        exact: Embedder | None = None,
    ) -> None:
        """Take the parts.

        Args:
            record: what is known of the router.
            centroids: shape (K, D), rows of unit length.
            embedder: that texts are embedded with.
            cascade: what is asked before it.
            exact: what embeds a text again where the lead is no more than the record says.
        """
        self._cascade = cascade
        self._exact = exact
        self._record = record
        self._centroids = centroids
        self._index = CentroidIndex(centroids)
        self._embedder = embedder

    @classmethod
    def fit(
        cls,
        vectors: Vectors,
        heldout: Vectors,
        config: RouterConfig,
        *,
        seed: int,
        embedder: Embedder,
        use_gpu: bool = False,
    ) -> Fitted:
        """Cluster what is trained on and calibrate abstention on the rest.

        Deterministic for a seed. Clusters are numbered by falling size, none is empty, and there
        may be fewer than `config.clusters` once near-duplicates are merged. Both arrays may be
        memory-mapped: of them at most `config.max_fit_documents` rows are held at a time.

        Args:
            vectors: of the training texts, shape (N, D), float32 rows of unit length.
            heldout: of texts of the same kind that are not trained on, shape (M, D).
            config: clustering and abstention.
            seed: of the sample and of k-means.
            embedder: what the vectors came from.
            use_gpu: run on faiss's GPUs where it has any.

        Raises:
            ClusteringError: fewer distinct vectors than clusters.
            CalibrationError: no held-out text to calibrate on.
        """
        clustering = fit_clusters(vectors, config, seed=seed, use_gpu=use_gpu)
        scores, nearest = nearest_centroids(heldout, clustering.centroids, use_gpu=use_gpu)
        record = RouterRecord(
            embedder=embedder.name,
            embedder_digest=embedder.digest,
            dimension=embedder.dimension,
            clusters=len(clustering.centroids),
            config=config,
            calibration=calibrate(scores, config.abstain_quantile),
            seed=seed,
        )
        router = cls(record, clustering.centroids, embedder)
        return Fitted(router, clustering.assignment, nearest)

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        embedder: Embedder | None = None,
        runtime: Runtime = "torch",
    ) -> Router:
        """Read a saved router and the embedder that belongs to it.

        Args:
            directory: what `save` wrote.
            device: of the embedder: `cpu`, `cuda` or `auto`.
            threads: bound on torch's and faiss's threads, for routing beside busy engines; it
                holds for the whole process.
            embedder: one already loaded, to be checked instead of loading the recorded one.
            runtime: what computes the embedder, as in `serving_embedder`.

        Raises:
            RouterFormatError: files missing, damaged or of another format.
            EmbedderNotFoundError: its embedding model cannot be loaded.
            EmbedderMismatchError: that model is not the one it was fitted with.
        """
        record, centroids = read_router(directory)
        if threads is not None:
            limit_threads(threads)
        exact = None
        if embedder is None:
            config = record.config.model_copy(update={"runtime": runtime})
            name, digest = record.embedder, record.embedder_digest
            load = partial(serving_embedder, name, digest, config, device=device, threads=threads)
            embedder = load(quantized=record.may_be_quantized)
            if getattr(embedder, "quantized", False) and record.doubted_lead > 0:
                exact = load()
        require_digest(embedder, record.embedder_digest)
        return cls(record, centroids, embedder, _read_cascade(directory, record), exact)

    def save(self, directory: Path) -> None:
        """Write the router as safetensors and JSON; the directory is made if missing."""
        steps = () if self._cascade is None else self._cascade.steps
        students = [step.student.arrays() for step in steps]
        write_router(directory, self._record, self._centroids, *students)

    def quantized(self, train: Texts, heldout: Texts) -> Router:
        """This router with what computing its embedder in 8 bits does to routes measured, which
        says whether it is served so.

        Args:
            train: the texts it was fitted on, with their vectors; they lie further inside of
                their clusters than others, so they count only where `heldout` are too few.
            heldout: the texts it was calibrated on.
        """
        record, full = self._record, self._embedder
        if not isinstance(full, SentenceEmbedder):
            return self
        try:
            embedder = serving_embedder(
                full.name, full.digest, record.config, device="cpu", threads=None, quantized=True
            )
        except ExportError:  # `runtime` insists on it: who serves is told
            return self
        if not isinstance(embedder, OnnxEmbedder) or not embedder.quantized:
            return self
        rng = np.random.default_rng(record.seed)
        right: list[Route] = []
        routes: list[Route] = []
        for some, most in ((heldout, MOST_MEASURED), (train, ENOUGH_MEASURED)):
            count = min(max(0, most - len(right)), len(some.vectors))
            rows = np.sort(rng.choice(len(some.vectors), count, replace=False))
            right += self.route_embeddings(some.vectors[rows])
            routes += self.route_embeddings(embedder.encode(some.read(rows)))
        agrees = np.array(
            [one.expert == other.expert for one, other in zip(right, routes, strict=True)]
        )
        leads = np.array([self._lead(route) for route in routes])
        limit = doubted_below(leads, agrees, record.config.quantized_agreement or 1.0)
        doubted = (leads <= limit) & (limit > 0)
        found = Quantized(
            texts=len(routes),
            agreement=float((agrees | doubted).mean()),
            doubted=float(doubted.mean()),
            lead=limit,
            levels=levels_here(),
            rounding=ROUNDING,
        )
        logger.info(
            "in 8 bits the embedder routes %.2f%% of %d texts alike, %.2f%% are computed again",
            100 * found.agreement,
            found.texts,
            100 * found.doubted,
        )
        record = record.model_copy(update={"quantized": found})
        return Router(record, self._centroids, full, self._cascade)

    def taught(self, train: Texts, heldout: Texts, on_progress: OnProgress = ignore) -> Router:
        """This router with a student of its embedder; without one where there are too few texts.

        Deterministic for the seed of the fit.

        Args:
            train: the texts it was fitted on, with their vectors.
            heldout: the texts it was calibrated on.
            on_progress: told each stage's name, done and total.
        """
        cascade = distil(
            train,
            heldout,
            centroids=self._centroids,
            threshold=self.threshold,
            embedder=self._embedder,
            config=self._record.config,
            seed=self._record.seed,
            on_progress=on_progress,
        )
        if cascade is None:
            return self
        second = cascade.second.record if cascade.second else None
        record = self._record.model_copy(update={"student": cascade.record, "encoder": second})
        return Router(record, self._centroids, self._embedder, cascade)

    @property
    def clusters(self) -> int:
        """Number of clusters, so of experts at the most."""
        return self._record.clusters

    @property
    def calibration(self) -> Calibration:
        """How the threshold came about."""
        return self._record.calibration

    @property
    def threshold(self) -> float:
        """Cosine below which the router abstains."""
        return self.calibration.threshold

    @property
    def student(self) -> StudentRecord | None:
        """How far the student is believed; none where there is no student."""
        return self._record.student

    @property
    def encoder(self) -> StudentRecord | None:
        """How far the second student is believed; none where there is none."""
        return self._record.encoder

    @property
    def embedder(self) -> Embedder:
        """What turns texts into vectors."""
        return self._embedder

    @property
    def centroids(self) -> Vectors:
        """Shape (K, D), rows of unit length."""
        return self._centroids

    def assign(self, embeddings: Vectors) -> Indices:
        """The nearest cluster of each vector, abstention aside.

        Args:
            embeddings: shape (N, D), as `route_embeddings` takes them; may be memory-mapped.

        Returns:
            Shape (N,).
        """
        return nearest_centroids(embeddings, self._centroids)[1]

    def route(self, texts: Sequence[str]) -> list[Route]:
        """Where each text goes: by the student where it is sure, else by the embedder."""
        guesses = self._cascade.sure_guesses(texts) if self._cascade else [None] * len(texts)
        unsure = [text for text, guess in zip(texts, guesses, strict=True) if guess is None]
        rest = iter(self._embedded(unsure)[1] if unsure else ())
        return [next(rest) if guess is None else self._believe(guess) for guess in guesses]

    def route_embeddings(self, embeddings: Vectors) -> list[Route]:
        """Where each vector goes.

        Args:
            embeddings: shape (N, D), float32 rows of unit length, from this router's embedder.
        """
        # The margin needs a runner-up, whatever number of candidates is to be shown.
        count = min(max(2, self._record.config.top_k), self.clusters)
        scores, clusters = self._index.search(embeddings, count)
        return [self._decide(*row) for row in zip(scores, clusters, strict=True)]

    def quick_route(self, messages: Sequence[Message]) -> Route | None:
        """`quick_routes` of one conversation."""
        return self.quick_routes([messages])[0]

    def quick_routes(self, conversations: Sequence[Sequence[Message]]) -> list[Route | None]:
        """Where each conversation goes, if the student is sure of it; takes a fraction of a
        millisecond, and less of each where there are many.

        The rules are those of `embedder_routes`, on what the student takes for the cosines. None
        where it is not sure of the text, of the first user turn, or of which of the two wins.

        Raises:
            UnroutableError: a conversation has no text.
        """
        cascade = self._cascade
        if cascade is None:
            return [None] * len(conversations)
        return self._guessed_routes(conversations, cascade, cascade.quick_guesses)

    def route_conversations(
        self, conversations: Sequence[Sequence[Message]], *, sure_only: bool = True
    ) -> list[Route]:
        """Where each conversation goes: by the student where it is sure, else by the embedder.

        Many at once are guessed at a fraction of what one alone costs. Rules as in
        `embedder_routes`.

        Args:
            conversations: of each, its messages.
            sure_only: false takes the student's word for all, where there is a student: several
                times as fast, and about as right as its agreement on all held-out text.

        Raises:
            UnroutableError: a conversation has no text.
        """
        cascade = self._cascade
        routes: list[Route | None] = [None] * len(conversations)
        if cascade is not None:
            guesses = partial(cascade.guesses, sure_only=sure_only)
            routes = self._guessed_routes(conversations, cascade, guesses, in_doubt=not sure_only)
        rest = iter(
            self.embedder_routes(
                [c for c, route in zip(conversations, routes, strict=True) if route is None]
            )
        )
        return [next(rest) if route is None else route for route in routes]

    def _guessed_routes(
        self,
        conversations: Sequence[Sequence[Message]],
        cascade: Cascade,
        guesses_of: Callable[[Sequence[str]], Sequence[Guess | None]],
        *,
        in_doubt: bool = False,
    ) -> list[Route | None]:
        """Where each conversation goes, as far as guesses tell, with one look at all texts.

        Args:
            conversations: of each, its messages.
            cascade: whose guesses they are.
            guesses_of: of distinct texts.
            in_doubt: where estimates are too close to tell, a conversation stays where it began.
        """
        config = self._record.config
        texts, openings = self._asked(conversations)
        unique = list(dict.fromkeys([*texts, *openings]))
        guesses = dict(zip(unique, guesses_of(unique), strict=True))
        found: list[Route | None] = []
        for text, opening in zip(texts, openings, strict=True):
            now, home = guesses[text], guesses[opening]
            if now is None or home is None:
                found.append(None)
            elif home.cluster == now.cluster:
                found.append(self._believe(now))
            else:
                leads = cascade.leads(now, home.cluster, config.sticky_margin)
                if leads is None and in_doubt:
                    leads = False
                found.append(None if leads is None else self._believe(now if leads else home))
        return found

    def _asked(self, conversations: Sequence[Sequence[Message]]) -> tuple[list[str], list[str]]:
        """Of each conversation the text that is routed on and the one that it began with."""
        config = self._record.config
        texts = [routing_text(messages, config.route_on) for messages in conversations]
        return texts, [opening_text(m) for m in conversations] if config.sticky else texts

    def embedder_routes(self, conversations: Sequence[Sequence[Message]]) -> list[Route]:
        """Where each conversation goes, by the full embedder.

        With `sticky`, a conversation stays with the expert of its first user turn, which every
        request of it repeats, unless the text routed on has an expert of its own whose centroid
        is nearer to it by more than `sticky_margin`; a text below the threshold has none. A
        conversation that stays gets the route of its first user turn, scores included.

        Raises:
            UnroutableError: a conversation has no text.
        """
        texts, openings = self._asked(conversations)
        unique = list(dict.fromkeys([*texts, *openings]))
        embeddings, routes = self._embedded(unique)
        place = {text: index for index, text in enumerate(unique)}
        return [
            self._settle(routes[place[text]], routes[place[opening]], embeddings[place[text]])
            for text, opening in zip(texts, openings, strict=True)
        ]

    def embed(self, texts: Sequence[str]) -> Vectors:
        """The vectors by which texts are routed: shape (N, D), rows of unit length."""
        return self._embedded(texts)[0]

    def _embedded(self, texts: Sequence[str]) -> tuple[Vectors, list[Route]]:
        """Vectors of texts and where they go, where the decision is close by full precision."""
        vectors = self._embedder.encode(texts)
        routes = self.route_embeddings(vectors)
        if self._exact is None:
            return vectors, routes
        limit = self._record.doubted_lead
        doubted = [place for place, route in enumerate(routes) if self._lead(route) <= limit]
        if doubted:
            vectors[doubted] = self._exact.encode([texts[place] for place in doubted])
            again = self.route_embeddings(vectors[doubted])
            for place, route in zip(doubted, again, strict=True):
                routes[place] = route
        return vectors, routes

    def _lead(self, route: Route) -> float:
        """How far a route is from being another."""
        return min(route.margin, abs(route.score - self.threshold))

    def _settle(self, now: Route, home: Route, embedding: Vectors) -> Route:
        """The route of a text in a conversation whose first user turn has the route `home`."""
        if home.abstained or (now.cluster == home.cluster and not now.abstained):
            return now
        lead = now.score - float(self._centroids[home.cluster] @ embedding)
        if now.abstained or lead <= self._record.config.sticky_margin:
            return home
        return now

    def _believe(self, guess: Guess) -> Route:
        return self._decide(guess.scores, guess.clusters, "student")

    def _decide(self, scores: Vectors, clusters: Indices, by: Decider = "embedder") -> Route:
        best, winner = float(scores[0]), int(clusters[0])
        runner_up = float(scores[1]) if len(scores) > 1 else -1.0
        abstained = best < self.threshold
        shown = self._record.config.top_k
        return Route(
            expert=None if abstained else expert_id(winner),
            cluster=winner,
            score=best,
            margin=best - runner_up,
            abstained=abstained,
            top=tuple(
                Candidate(expert_id(int(cluster)), float(score))
                for score, cluster in zip(scores[:shown], clusters[:shown], strict=True)
            ),
            by=by,
        )


def _read_cascade(directory: Path, record: RouterRecord) -> Cascade | None:
    """The cascade of a saved router, where it has one."""
    if record.student is None:
        return None
    from router.encoder import Encoder
    from router.student import Student

    second, limit = None, record.config.max_tokens
    if record.encoder is not None:
        encoder = _restored(Encoder, directory, ENCODER_FILE, record.encoder)
        second = Cascade(encoder, record.encoder, limit)
    student = _restored(Student.restore, directory, STUDENT_FILE, record.student)
    return Cascade(student, record.student, limit, second)


def _restored(
    make: Callable[[Mapping[str, npt.NDArray[Any]], Mapping[str, Any]], Guesser],
    directory: Path,
    name: str,
    record: StudentRecord,
) -> Guesser:
    """A student from its file."""
    arrays = read_student(directory, name)
    try:
        return make(arrays, record.settings)
    except RouterFormatError as error:
        raise RouterFormatError(f"{directory / name}: {error}; {REMEDY}") from None
