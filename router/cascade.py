"""Fast students before the slow embedder: which of their guesses are taken for the answer.

How sure each must be was measured at fit time, for short texts and for long ones. Knows nothing of
how a student guesses, nor of what becomes of a text that none is sure of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from router.calibration import Sureness
from router.guess import Guess, is_short

CHARACTERS_PER_TOKEN = 5
"""About as much of a long text as the embedder reads, without cutting it into tokens first."""
REMEMBERED = 1024
"""Texts whose guesses are kept for those who are asked next."""


class Guesser(Protocol):
    """Whatever guesses in a fraction of a millisecond what the embedder would say."""

    def guess(self, text: str) -> Guess:
        """Of one text."""
        ...

    def guess_many(self, texts: Sequence[str]) -> Sequence[Guess]:
        """Of each text."""
        ...

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What it has learnt."""
        ...

    def settings(self) -> dict[str, Any]:
        """What goes with that, as JSON takes it."""
        ...


@runtime_checkable
class SecondGuesser(Guesser, Protocol):
    """A student that is asked after another one, and makes use of what that has guessed."""

    def guess_after(self, firsts: Sequence[Guess], texts: Sequence[str]) -> Sequence[Guess]:
        """Of each text, by both together."""
        ...


class Measured(BaseModel):
    """How a student did on one kind of text that it has not learnt from, or that another one like
    it has not."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    texts: int
    answered: float
    """Share that it answered; the others fall through to the embedder."""
    agreement: float | None
    """Share of its answers that are the embedder's own; none without an answer."""


class StudentRecord(BaseModel):
    """The student's part of `router.json`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    target: float
    """Agreement that was asked for."""
    short: Sureness
    """Limits for texts of up to 120 characters."""
    long: Sureness
    """Limits for longer ones."""
    documents: Measured
    """On whole documents; of a second student, with what the first has answered."""
    pieces: Measured
    """On sentences and other parts of them, likewise."""
    lead_error: float
    """What the estimated lead of a cluster over another is off by, at the target's quantile."""
    training_texts: int
    """Documents and pieces that it was fitted on."""
    settings: dict[str, Any]
    """The student's own."""


class Cascade:
    """A student that answers where it is sure, and what is asked where it is not.

    Args:
        student: guesses.
        record: how sure it must be.
        max_tokens: of a text, which are all that the embedder reads.
        second: a slower and better one, asked where this one is not sure.
    """

    def __init__(
        self,
        student: Guesser,
        record: StudentRecord,
        max_tokens: int,
        second: Cascade | None = None,
    ) -> None:
        self.student = student
        self.record = record
        self.second = second
        # asked here, for that is not done in a moment
        self._guess_after = student.guess_after if isinstance(student, SecondGuesser) else None
        self._characters = max_tokens * CHARACTERS_PER_TOKEN
        self._unsure: dict[str, Guess] = {}

    def quick_guesses(self, texts: Sequence[str]) -> list[Guess | None]:
        """The first student's guess for each text, if it can be taken for the answer."""
        found: list[Guess | None] = [None] * len(texts)
        limits = [self._limits(text) for text in texts]
        asked = [place for place, of in enumerate(limits) if of.confidence is not None]
        seen = [texts[place][: self._characters] for place in asked]
        for place, text, guess in zip(asked, seen, self.student.guess_many(seen), strict=True):
            if limits[place].allows(guess.confidence, guess.score):
                found[place] = guess
                continue
            if len(self._unsure) >= REMEMBERED:
                self._unsure.clear()
            # As a rule `guesses` is asked next, by another thread.
            self._unsure[text] = guess
        return found

    def sure_guesses(self, texts: Sequence[str]) -> list[Guess | None]:
        """A guess for each text, at once: the first that is sure; none where nobody is."""
        return self.guesses(texts, sure_only=True)

    def guesses(self, texts: Sequence[str], *, sure_only: bool) -> list[Guess | None]:
        """A guess for each text, at once; none where no student is sure enough, if that counts.

        Where it does not, the first student alone is asked, which is the fastest.
        """
        guesses = self._first_guesses(texts)
        if not sure_only:
            return list(guesses)
        found = self._believed(texts, guesses)
        left = [place for place, guess in enumerate(found) if guess is None]
        if self.second is not None and left:
            more = self.second._after([texts[p] for p in left], [guesses[p] for p in left])
            for place, guess in zip(left, more, strict=True):
                found[place] = guess
        return found

    def _first_guesses(self, texts: Sequence[str]) -> list[Guess]:
        """The first student's, whatever they are worth; what `quick_guesses` has just made is not
        made again."""
        seen = [text[: self._characters] for text in texts]
        known = [self._unsure.pop(text, None) for text in seen]
        new = [text for text, guess in zip(seen, known, strict=True) if guess is None]
        rest = iter(self.student.guess_many(new))
        return [next(rest) if guess is None else guess for guess in known]

    def _after(self, texts: Sequence[str], firsts: Sequence[Guess]) -> list[Guess | None]:
        """Guesses of a second student, who knows what the first has guessed; none where that was
        so unsure that this one would hardly ever be sure either."""
        assert self._guess_after is not None
        found: list[Guess | None] = [None] * len(texts)
        asked = [
            place
            for place, (text, first) in enumerate(zip(texts, firsts, strict=True))
            if self._limits(text).asks(first.confidence)
        ]
        some = [texts[place] for place in asked]
        seen = [text[: self._characters] for text in some]
        guesses = self._guess_after([firsts[place] for place in asked], seen)
        for place, guess in zip(asked, self._believed(some, guesses), strict=True):
            found[place] = guess
        return found

    def _believed(self, texts: Sequence[str], guesses: Sequence[Guess]) -> list[Guess | None]:
        return [
            guess if self._limits(text).allows(guess.confidence, guess.score) else None
            for text, guess in zip(texts, guesses, strict=True)
        ]

    def _limits(self, text: str) -> Sureness:
        return self.record.short if is_short(text) else self.record.long

    def leads(self, guess: Guess, home: int, margin: float) -> bool | None:
        """Whether the guessed cluster is ahead of another by more than a margin.

        None where the estimates are too close to it to tell, or know nothing of that cluster.
        """
        (places,) = np.nonzero(guess.clusters == home)
        if not places.size:
            return None
        lead = float(guess.scores[0] - guess.scores[places[0]])
        # whichever student guessed: the one whose estimates err more
        error = max(step.record.lead_error for step in self.steps)
        return None if abs(lead - margin) <= error else lead > margin

    @property
    def steps(self) -> tuple[Cascade, ...]:
        """This one and those after it."""
        return (self, *(self.second.steps if self.second else ()))


def seen_by_student(text: str, max_tokens: int) -> str:
    """As much of a text as the student is shown."""
    return text[: max_tokens * CHARACTERS_PER_TOKEN]
