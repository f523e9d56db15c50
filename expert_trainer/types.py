"""The vocabulary of this room: documents, shards, jobs' results and events.

Knows no behaviour; light enough to import from the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from configs.manifest import ExpertCard

Message = Mapping[str, Any]
"""One turn of a chat: `role`, `content` and whatever else its template knows."""


@dataclass(frozen=True, slots=True)
class Document:
    """One row of a corpus: a plain text, a chat, or a prompt with its completion."""

    id: str
    """The row's own id, or FILE:LINE."""
    text: str = ""
    """The plain text, or the completion of a `prompt`; empty for a chat."""
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A document as the model sees it."""

    token_ids: list[int]
    targets: list[bool]
    """Whether each token is to be predicted; never the first, which has nothing before it."""

    @property
    def target_count(self) -> int:
        """Tokens that are predicted."""
        return sum(self.targets)


@dataclass(frozen=True)
class PoolStarted:
    """The pool knows what it has to do."""

    queued: int
    """Experts (or other jobs' members) to do; those reused are not among them."""
    actors: int
    """Actors that are being started."""
    steps: int = 0
    """Optimiser steps of all of them together, at the most; 0: not known."""


@dataclass(frozen=True)
class ActorUp:
    """An actor has loaded the base and waits for work."""

    actor: str
    """The actor's name in Ray."""
    node: str
    """Host name of its node, or its address where several nodes share a host."""
    device: str
    """What the actor is pinned to: `cuda:0` or `cores:0-3`."""
    pid: int
    """The actor's process on its node."""


@dataclass(frozen=True)
class ActorLost:
    """An actor is gone; whoever replaces it is told of by another `ActorUp`.

    Its experts fail in events of their own, unless it was its node that went: then they wait
    again, and the next that is told of them is that they start, with the same attempt.
    """

    actor: str
    cause: str


@dataclass(frozen=True)
class ExpertStarted:
    """An actor took up an expert."""

    id: str
    actor: str
    steps: int
    attempt: int
    """1 for the first try."""


@dataclass(frozen=True)
class ExpertProgress:
    """An expert moved on."""

    id: str
    actor: str
    step: int
    steps: int
    loss: float
    """Training loss since the last such event, nats per token."""
    tokens: int
    """Tokens trained on so far."""
    tokens_per_second: float
    """Of this expert alone."""


@dataclass(frozen=True)
class ExpertMeasured:
    """An expert's held-out loss was measured on the way."""

    id: str
    step: int
    loss: float
    """Nats per token."""


@dataclass(frozen=True)
class ExpertFinished:
    """An expert is trained, measured and on disk."""

    id: str
    card: ExpertCard


@dataclass(frozen=True)
class ExpertReused:
    """An expert of an earlier run was made from the same inputs and stands."""

    id: str
    card: ExpertCard


@dataclass(frozen=True)
class ExpertFailed:
    """One try at an expert failed."""

    id: str
    cause: str
    attempt: int
    final: bool
    """No further try follows."""


@dataclass(frozen=True)
class JobFinished:
    """A job's member that is no expert of the bundle is done: a measurement, the single LoRA."""

    id: str
    outcome: Any


@dataclass(frozen=True)
class PoolEnded:
    """All jobs are done and the actors are gone."""

    seconds: float
    """Wall time of all actors together, each from its first job to its last."""
    computing: float
    """Of these, the seconds inside forward, backward and optimiser steps."""


TrainEvent = (
    PoolStarted
    | ActorUp
    | ActorLost
    | ExpertStarted
    | ExpertProgress
    | ExpertMeasured
    | ExpertFinished
    | ExpertReused
    | ExpertFailed
    | JobFinished
    | PoolEnded
)
OnEvent = Callable[[TrainEvent], None]
