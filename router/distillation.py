"""Teaching a student what the embedder would say, and measuring from when on to believe it.

The student learns from documents whose vectors are there already, from short pieces of them, since
those who ask write a sentence where a corpus has pages, and from queries made up of both; these are
embedded for it. What it is measured on it has not learnt from. Knows nothing of how a student
learns.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from configs.schema import RouterConfig
from router.calibration import Sureness, sure_from
from router.cascade import Cascade, Guesser, Measured, StudentRecord, is_short, seen_by_student
from router.embedder import Embedder, SentenceEmbedder
from router.encoder_training import can_be_cut, train_encoder
from router.guess import Guess, blended
from router.student_queries import made_up_queries
from router.types import OnProgress, ignore

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

LEAST_DOCUMENTS = 1000
"""Below this a student would hardly ever be sure, and an embedder is fast enough for anybody who
has no more to say."""
MOST_DOCUMENTS = 40_000
"""Documents to learn from."""
MOST_PIECES, MOST_MADE_UP = 3000, 5000
"""Pieces, and queries made up of several documents, to learn from; each has to be embedded."""
MOST_FOR_ENCODER, MOST_OF_EACH = 24_000, 4
"""Queries to make up where an encoder learns from them, too, which gains more by them: in all, and
for each document."""
MEASURED_DOCUMENTS, MEASURED_PIECES = 4000, 1500
"""To measure on."""
ENOUGH_MEASURED = 1500
"""Fewer held-out documents than this are joined by some of the training ones..."""
MOST_SET_ASIDE = 0.2
"""... up to this share of them, which the student then does not learn from."""
TRIED_SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3)
"""Of the disagreements that the target leaves, what a first student may have before a second."""
TRIED_DEVIATIONS = 1.5
"""Certainty of limits that are the best of several."""
ENCODER_WORK = 0.3
"""Of an encoder for a text, as a share of the embedder's."""
EMBEDDED_AT_ONCE = 1024
"""Short texts between two words on how far it is."""
CUT_FROM_WORDS = 30
"""A document of fewer words is as short as a question already."""
SPAN_WORDS = (5, 15)
LEAST_SENTENCE_WORDS = 3
SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|\n+")


@dataclass(frozen=True)
class Texts:
    """Many texts that need not be in memory, with their vectors."""

    vectors: Vectors
    """Shape (N, D), rows of unit length; may be memory-mapped."""
    read: Callable[[Indices], list[str]]
    """The texts of some rows, given in rising order."""


@dataclass(frozen=True)
class _Sample:
    """Texts with their cosines with every centroid."""

    texts: list[str]
    cosines: Vectors
    """Shape (N, K)."""

    def __add__(self, other: _Sample) -> _Sample:
        return _Sample(self.texts + other.texts, np.concatenate([self.cosines, other.cosines]))


def distil(
    train: Texts,
    heldout: Texts,
    *,
    centroids: Vectors,
    threshold: float,
    embedder: Embedder,
    config: RouterConfig,
    seed: int,
    on_progress: OnProgress = ignore,
) -> Cascade | None:
    """A student of the embedder; none where there are too few texts to teach it.

    Deterministic for a seed. At most 28,500 short texts are embedded for it.

    Args:
        train: what the clusters were fitted on.
        heldout: what abstention was calibrated on.
        centroids: of the clusters, shape (K, D).
        threshold: cosine below which the router abstains.
        embedder: the teacher.
        config: agreement asked for and tokens that are read.
        seed: of every sample.
        on_progress: told each stage's name, done and total.
    """
    from router.encoder import Encoder
    from router.student import Student

    if len(train.vectors) < LEAST_DOCUMENTS or len(centroids) < 2:
        return None
    random = np.random.default_rng(seed)
    learnt, aside = _split(len(train.vectors), len(heldout.vectors), random)
    tested = _some(len(heldout.vectors), MEASURED_DOCUMENTS, random)

    def sample(texts: Texts, rows: Indices) -> _Sample:
        return _Sample(texts.read(rows), texts.vectors[rows] @ centroids.T)

    def cut(documents: list[str], most: int) -> _Sample:
        pieces = cut_pieces(documents, most, random)
        return _Sample(pieces, embedded(pieces, "embedding parts of documents"))

    def embedded(queries: list[str], stage: str) -> Vectors:
        found = [np.zeros((0, len(centroids)), dtype=np.float32)]
        for start in range(0, len(queries), EMBEDDED_AT_ONCE):
            on_progress(stage, start, len(queries))
            some = queries[start : start + EMBEDDED_AT_ONCE]
            found.append(embedder.encode(some) @ centroids.T)
        on_progress(stage, len(queries), len(queries))
        return np.concatenate(found)

    lessons = sample(train, learnt)
    encoding = bool(config.encoder_layers) and can_be_cut(embedder)
    most = min(MOST_FOR_ENCODER, MOST_OF_EACH * len(learnt)) if encoding else MOST_MADE_UP
    made_up = made_up_queries(lessons.texts, most, seed=seed)
    lessons += cut(lessons.texts, MOST_PIECES)
    lessons += _Sample(made_up, embedded(made_up, "embedding made-up queries"))
    documents = sample(heldout, tested) + sample(train, aside)
    pieces = cut(documents.texts, MEASURED_PIECES)
    on_progress("teaching the student", 0, 1)
    fresh = Student.fit(
        [seen_by_student(text, config.max_tokens) for text in lessons.texts],
        lessons.cosines,
        seed=seed,
    )
    on_progress("teaching the student", 1, 1)
    # The one that will be loaded, whose numbers have been rounded, is the one to measure.
    student = Student.restore(fresh.arrays(), fresh.settings())
    exam = documents + pieces
    seen = [seen_by_student(text, config.max_tokens) for text in exam.texts]
    guesses = student.guess_many(seen)
    terms = Terms(len(documents.texts), threshold, config.agreement)
    record, answers = measure(exam.texts, guesses, exam.cosines, terms)

    def step(of: Guesser, measured: StudentRecord, second: Cascade | None = None) -> Cascade:
        told = {"training_texts": len(lessons.texts), "settings": of.settings()}
        return Cascade(of, measured.model_copy(update=told), config.max_tokens, second)

    _tell("student", record)
    alone = step(student, record)
    if not encoding:
        return alone
    assert isinstance(embedder, SentenceEmbedder), "it has layers"
    parts = train_encoder(
        embedder,
        lessons.texts,
        lessons.cosines,
        layers=config.encoder_layers,
        seed=seed,
        threads=1,
        on_progress=on_progress,
    )
    encoder = Encoder(*parts)
    second = [
        blended(first, own) for first, own in zip(guesses, encoder.guess_many(seen), strict=True)
    ]
    pair = measure_pair(exam.texts, guesses, second, exam.cosines, terms)
    if pair is None or float(np.mean(~answers.sure)) <= pair.work:
        logger.info("the encoder would spare no work, so there is none")
        return alone
    _tell("student with its encoder", pair.second)
    return step(student, pair.first, step(encoder, pair.second))


@dataclass(frozen=True)
class Terms:
    """What a student is measured by."""

    documents: int
    """How many of the held-out texts, which begin with them, are documents."""
    threshold: float
    """Cosine below which the router abstains."""
    target: float
    """Agreement that is asked for."""
    deviations: float = 1.0
    """Standard deviations by which it must be certain."""


@dataclass(frozen=True)
class Pair:
    """Two students, one asked where the other is not sure."""

    first: StudentRecord
    second: StudentRecord
    work: float
    """Of the embedder's for the same texts, the share that is left with them."""


@dataclass(frozen=True)
class Answers:
    """What was answered of the held-out texts, each of shape (N,)."""

    sure: Flags
    right: Flags
    """Whether the answer is the embedder's; means nothing where there is none."""


def measure(
    texts: list[str],
    guesses: Sequence[Guess],
    cosines: Vectors,
    terms: Terms,
    before: Answers | None = None,
) -> tuple[StudentRecord, Answers]:
    """From when on a student is believed, and what that comes to.

    A text on which the embedder abstains counts as a disagreement, whatever is guessed.

    Args:
        texts: held out, documents first.
        guesses: of each.
        cosines: the embedder's, shape (N, K).
        terms: what is asked for.
        before: of the student that is asked first; this one answers what that leaves, and the
            target is that of both together.

    Returns:
        The record, and the answers of both.
    """
    clusters = np.array([guess.cluster for guess in guesses], dtype=np.int64)
    confidences = np.array([guess.confidence for guess in guesses], dtype=np.float64)
    scores = np.array([guess.score for guess in guesses], dtype=np.float64)
    right = (clusters == cosines.argmax(axis=1)) & (cosines.max(axis=1) >= terms.threshold)
    brief = np.array([is_short(text) for text in texts], dtype=np.bool_)
    taken = np.zeros(len(texts), dtype=np.bool_) if before is None else before.sure
    earlier = right if before is None else before.right

    def limits_of(kind: Flags) -> Sureness:
        rows, done = kind & ~taken, kind & taken
        return sure_from(
            confidences[rows],
            scores[rows],
            right[rows],
            target=terms.target,
            floor=terms.threshold,
            deviations=terms.deviations,
            before=(int(done.sum()), int((~earlier[done]).sum())),
        )

    short, long = limits_of(brief), limits_of(~brief)
    believed = np.array(
        [
            (short if is_brief else long).allows(confidence, score)
            for is_brief, confidence, score in zip(brief, confidences, scores, strict=True)
        ],
        dtype=np.bool_,
    )
    own = believed & ~taken
    answers = Answers(sure=taken | own, right=np.where(taken, earlier, right))
    is_document = np.arange(len(texts)) < terms.documents
    record = StudentRecord(
        target=terms.target,
        short=short,
        long=long,
        documents=_measured(answers.sure, answers.right, is_document),
        pieces=_measured(answers.sure, answers.right, ~is_document),
        lead_error=_lead_error(
            [g for g, counts in zip(guesses, own, strict=True) if counts],
            cosines[own],
            terms.target,
        ),
        training_texts=0,
        settings={},
    )
    return record, answers


def measure_pair(
    texts: list[str],
    first: Sequence[Guess],
    second: Sequence[Guess],
    cosines: Vectors,
    terms: Terms,
) -> Pair | None:
    """How sure each of two students must be for the least work, together within the target.

    What the first may get wrong is taken from what is left for the second, which errs less: so the
    first gets a share of it, the best of some that are tried, and is then asked for more certainty.

    Args:
        texts: held out, documents first.
        first: guesses of the one that is asked first.
        second: guesses of the other, blended with them.
        cosines: the embedder's, shape (N, K).
        terms: what is asked for.

    Returns:
        None where the second would not be believed.
    """
    best: Pair | None = None
    strict = replace(terms, deviations=TRIED_DEVIATIONS)
    for share in TRIED_SHARES:
        stricter = replace(strict, target=1 - share * (1 - terms.target))
        one, answers = measure(texts, first, cosines, stricter)
        two, both = measure(texts, second, cosines, strict, answers)
        work = _work(answers.sure, both.sure)
        if both.sure.sum() > answers.sure.sum() and (best is None or work < best.work):
            best = Pair(one, two, work)
    return best


def _work(first: Flags, both: Flags) -> float:
    """Share of the embedder's work that is left where two students answer some texts."""
    return ENCODER_WORK * float(np.mean(~first)) + float(np.mean(~both))


def cut_pieces(documents: list[str], most: int, random: np.random.Generator) -> list[str]:
    """Short pieces of documents: first sentences, other sentences, spans of 5 to 15 words.

    Args:
        documents: those of fewer than 30 words are left alone.
        most: pieces, at the most; two of a document, and more where that gives too few.
        random: which document gives which piece.
    """
    long = [text for text in documents if len(text.split(None, CUT_FROM_WORDS)) > CUT_FROM_WORDS]
    if not long:
        return []
    pieces: list[str] = []
    for round_ in range(4):
        for place in random.permutation(len(long)):
            if len(pieces) == most:
                return list(dict.fromkeys(pieces))
            piece = _sentence(long[place], random) if round_ % 2 else _span(long[place], random)
            if piece:
                pieces.append(piece)
    return list(dict.fromkeys(pieces))


def _sentence(text: str, random: np.random.Generator) -> str:
    """The first sentence, or any other as often; empty where that is no more than a heading."""
    parts = SENTENCE_END.split(text)
    part = parts[0 if random.random() < 0.5 else int(random.integers(len(parts)))].strip()
    return part if len(part.split()) >= LEAST_SENTENCE_WORDS else ""


def _span(text: str, random: np.random.Generator) -> str:
    words = text.split()
    length = int(random.integers(SPAN_WORDS[0], SPAN_WORDS[1] + 1))
    start = int(random.integers(max(1, len(words) - length)))
    return " ".join(words[start : start + length])


def _split(train: int, heldout: int, random: np.random.Generator) -> tuple[Indices, Indices]:
    """Training rows to learn from and to set aside, both rising."""
    wanted = min(max(0, ENOUGH_MEASURED - heldout), int(MOST_SET_ASIDE * train))
    chosen = random.permutation(train)[: wanted + MOST_DOCUMENTS]
    return np.sort(chosen[wanted:]), np.sort(chosen[:wanted])


def _some(count: int, most: int, random: np.random.Generator) -> Indices:
    return np.sort(random.permutation(count)[:most])


def _measured(sure: Flags, right: Flags, rows: Flags) -> Measured:
    count, answered = int(rows.sum()), int((sure & rows).sum())
    return Measured(
        texts=count,
        answered=answered / count if count else 0.0,
        agreement=float(right[sure & rows].mean()) if answered else None,
    )


def _lead_error(guesses: Sequence[Guess], cosines: Vectors, target: float) -> float:
    """What the winner's estimated lead over the runner-up is off by, at most in `target` of all."""
    if not guesses:
        return 0.0
    first, second = (np.array([g.clusters[place] for g in guesses]) for place in (0, 1))
    leads = np.array([g.scores[0] - g.scores[1] for g in guesses])
    rows = np.arange(len(guesses))
    true = cosines[rows, first] - cosines[rows, second]
    return float(np.quantile(np.abs(leads - true), target))


def _tell(who: str, record: StudentRecord) -> None:
    for kind, found in (("documents", record.documents), ("pieces", record.pieces)):
        agreement = "" if found.agreement is None else f", {found.agreement:.1%} as the embedder"
        logger.info(
            "the %s answers %.1f%% of %d %s%s",
            who,
            100 * found.answered,
            found.texts,
            kind,
            agreement,
        )
