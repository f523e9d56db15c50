"""Teaching students what the embedder would say, and having them measured.

They learn from documents whose vectors are there already, from short pieces of them, since those
who ask write a sentence where a corpus has pages, and from queries made up of both; these are
embedded for it. What they are measured on they have not learnt from. Where held-out documents are
few, the student is cross-fitted: for each fold of the training documents another one is taught,
which has not learnt from it, and what those get right of all folds tells how sure the one may be
that has learnt from all. Teaching an encoder takes too long for that: it leaves one fold aside.
Knows nothing of how a student learns.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.schema import RouterConfig
from router.cascade import Cascade, Guesser, StudentRecord, seen_by_student
from router.embedder import Embedder, SentenceEmbedder
from router.encoder_training import can_be_cut, train_encoder
from router.measuring import Exam, Terms, measure, measure_pair
from router.student import Student
from router.student_confidence import Seen, fit_confidence, unseen_confidence
from router.student_queries import made_up_queries
from router.types import OnProgress, ignore

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

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
ENOUGH_HELDOUT = 1500
"""Where held-out documents are fewer than this, the student is cross-fitted."""
FOLDS = 5
"""Of the training documents then. The one that an encoder leaves aside is what it is measured on,
beside the held-out ones."""
EMBEDDED_AT_ONCE = 1024
"""Short texts between two words on how far it is."""
CUT_FROM_WORDS = 30
"""A document of fewer words is as short as a question already."""
SPAN_WORDS = (5, 15)
LEAST_SENTENCE_WORDS = 3
PIECES_STAGE, STUDENT_STAGE = "embedding parts of documents", "teaching the student"
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

    @classmethod
    def joined(cls, parts: Sequence[_Sample]) -> _Sample:
        texts = [text for part in parts for text in part.texts]
        return cls(texts, np.concatenate([part.cosines for part in parts]))


@dataclass(frozen=True)
class _Fold:
    """Some documents and what was made of them; no document is in two folds."""

    documents: _Sample
    pieces: _Sample
    queries: _Sample
    """Made up; to learn from, not to be measured on."""

    @property
    def lessons(self) -> tuple[_Sample, ...]:
        return self.documents, self.pieces, self.queries

    @property
    def exam(self) -> Exam:
        return _exam(self.documents, self.pieces)


def _exam(documents: _Sample, pieces: _Sample) -> Exam:
    asked = _Sample.joined([documents, pieces])
    return Exam(asked.texts, asked.cosines, np.arange(len(asked.texts)) < len(documents.texts))


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

    if len(train.vectors) < LEAST_DOCUMENTS or len(centroids) < 2:
        return None
    encoding = bool(config.encoder_layers) and can_be_cut(embedder)
    sources = _Sources(embedder, centroids, np.random.default_rng(seed), on_progress)
    folds, others = _folds(train, heldout, sources, seed=seed, for_encoder=encoding)
    student, exam, seen = _taught(folds, others, config, seed, on_progress)
    terms = Terms(threshold, config.agreement)
    right = exam.right(seen.clusters_N, threshold)
    coefficients = fit_confidence(seen, right, len(centroids))
    # The one that will be loaded, whose numbers have been rounded, is the one to measure.
    student = _rounded(student.with_confidence(coefficients))
    guesses = seen.guesses(unseen_confidence(seen, right, len(centroids)))
    record, _ = measure(exam, guesses, terms)

    def step(of: Guesser, told: StudentRecord, learnt: int, then: Cascade | None = None) -> Cascade:
        more = {"training_texts": learnt, "settings": of.settings()}
        return Cascade(of, told.model_copy(update=more), config.max_tokens, then)

    _tell("student", record)
    lessons = sum(len(part.texts) for fold in folds for part in fold.lessons)
    alone = step(student, record, lessons)
    if not encoding:
        return alone
    assert isinstance(embedder, SentenceEmbedder), "it has layers"
    known = _Sample.joined([part for fold in folds[1:] or folds for part in fold.lessons])
    parts = train_encoder(
        embedder,
        known.texts,
        known.cosines,
        layers=config.encoder_layers,
        seed=seed,
        threads=1,
        on_progress=on_progress,
    )
    encoder = Encoder(*parts)
    # What it has not learnt from stands at the ends: the first of several folds, and the held-out.
    aside = len(folds[0].exam.texts) if len(folds) > 1 else 0
    rows = np.arange(len(exam.texts))
    rows = rows[(rows < aside) | (rows >= len(rows) - len(others.texts))]
    texts = [seen_by_student(exam.texts[row], config.max_tokens) for row in rows]
    together = encoder.seen_after([guesses[row] for row in rows], texts)
    right = exam.of(rows).right(together.clusters_N, threshold)
    coefficients = fit_confidence(together, right, len(centroids))
    encoder = encoder.with_confidence(coefficients)
    second = together.guesses(unseen_confidence(together, right, len(centroids)))
    pair = measure_pair(exam, guesses, rows, second, terms)
    if pair is None:
        logger.info("the encoder would answer too little for its work, so there is none")
        return alone
    _tell("student with its encoder", pair.second)
    return step(student, pair.first, lessons, step(encoder, pair.second, len(known.texts)))


@dataclass(frozen=True)
class _Sources:
    """Where texts with cosines come from."""

    embedder: Embedder
    centroids: Vectors
    random: np.random.Generator
    on_progress: OnProgress

    def given(self, texts: Texts, rows: Indices) -> _Sample:
        """Some of them, whose vectors are there."""
        rows = np.sort(rows)
        return _Sample(texts.read(rows), texts.vectors[rows] @ self.centroids.T)

    def embedded(self, texts: list[str], stage: str) -> _Sample:
        found = [np.zeros((0, len(self.centroids)), dtype=np.float32)]
        for start in range(0, len(texts), EMBEDDED_AT_ONCE):
            self.on_progress(stage, start, len(texts))
            some = texts[start : start + EMBEDDED_AT_ONCE]
            found.append(self.embedder.encode(some) @ self.centroids.T)
        self.on_progress(stage, len(texts), len(texts))
        return _Sample(texts, np.concatenate(found))

    def cut(self, documents: list[str], most: int) -> _Sample:
        """Pieces of documents."""
        return self.embedded(cut_pieces(documents, most, self.random), PIECES_STAGE)


def _folds(
    train: Texts, heldout: Texts, sources: _Sources, *, seed: int, for_encoder: bool
) -> tuple[list[_Fold], Exam]:
    """What is learnt from, in several folds where held-out documents are few, and an exam of
    those."""
    chosen = sources.random.permutation(len(train.vectors))[:MOST_DOCUMENTS]
    tested = sources.random.permutation(len(heldout.vectors))[:MEASURED_DOCUMENTS]
    count = FOLDS if len(heldout.vectors) < ENOUGH_HELDOUT else 1
    most = min(MOST_FOR_ENCODER, MOST_OF_EACH * len(chosen)) if for_encoder else MOST_MADE_UP
    parts = [sources.given(train, rows) for rows in np.array_split(chosen, count)]
    others = sources.given(heldout, tested)
    known = {text for part in (*parts, others) for text in part.texts}
    folds = []
    for number, part in enumerate(parts):
        queries = made_up_queries(part.texts, most // count, seed=seed + number, known=known)
        folds.append(
            _Fold(
                part,
                sources.cut(part.texts, MOST_PIECES // count),
                sources.embedded(queries, "embedding made-up queries"),
            )
        )
    return folds, _exam(others, sources.cut(others.texts, MEASURED_PIECES))


def _taught(
    folds: list[_Fold], others: Exam, config: RouterConfig, seed: int, on_progress: OnProgress
) -> tuple[Student, Exam, Seen]:
    """A student of all folds, the texts that it can be measured on, and what is seen of the guesses
    at them: at those of a fold, of one that has learnt from the other folds."""

    def read(texts: list[str]) -> list[str]:
        return [seen_by_student(text, config.max_tokens) for text in texts]

    def learnt(from_: Sequence[_Fold]) -> Student:
        lessons = _Sample.joined([part for fold in from_ for part in fold.lessons])
        return _rounded(Student.fit(read(lessons.texts), lessons.cosines, seed=seed))

    asked, seen = [], []
    total = len(folds) + 1 if len(folds) > 1 else 1
    for number, fold in enumerate(folds if len(folds) > 1 else ()):
        on_progress(STUDENT_STAGE, number, total)
        asked.append(fold.exam)
        another = learnt([*folds[:number], *folds[number + 1 :]])
        seen.append(another.seen(read(asked[-1].texts)))
    on_progress(STUDENT_STAGE, total - 1, total)
    student = learnt(folds)
    on_progress(STUDENT_STAGE, total, total)
    if others.texts:
        asked.append(others)
        seen.append(student.seen(read(others.texts)))
    return student, Exam.joined(asked), Seen.joined(seen)


def _rounded(student: Student) -> Student:
    """As it will be once it was saved and loaded."""
    return Student.restore(student.arrays(), student.settings())


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
