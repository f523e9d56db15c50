"""What a training actor is handed and what it reports back.

Knows nothing of Ray, of devices or of what a job computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from expert_trainer.errors import ExpertError

if TYPE_CHECKING:
    from expert_trainer.workbench import Workbench


@dataclass(frozen=True, slots=True)
class StepTaken:
    """A member moved on by an optimiser step."""

    id: str
    step: int
    """Steps taken, those before a resumption included."""
    loss: float
    """Training loss of that step, nats per token."""
    tokens: int
    """Tokens trained on so far, those before a resumption included."""
    seconds: float
    """Since this run of the job began."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A member's held-out loss was measured on the way."""

    id: str
    step: int
    loss: float
    """Nats per token."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A member is done."""

    id: str
    value: Any


@dataclass(frozen=True, slots=True)
class MemberFailed:
    """A member cannot go on; the others of its job do."""

    id: str
    cause: ExpertError


JobItem = StepTaken | Measured | Outcome | MemberFailed


class Job(Protocol):
    """Work for one actor.

    Most jobs have one member; experts that are trained together are the members of one job. Each
    member ends with exactly one `Outcome` or `MemberFailed`, unless the whole job raises.
    """

    @property
    def members(self) -> tuple[str, ...]:
        """Names in events."""

    @property
    def steps(self) -> int:
        """Steps of all members together: how long the job takes, for the order."""

    def steps_of(self, member: str) -> int:
        """Optimiser steps that a member will take at the most."""

    def only(self, members: Sequence[str]) -> Job:
        """The same work for some of its members alone."""

    def read(self, bench: Workbench) -> Any:
        """Read ahead, in a thread and off the device, while another job computes."""

    def run(self, bench: Workbench, data: Any) -> Iterator[JobItem]:
        """Do the work; `data` is what `read` returned.

        A job whose earlier run died goes on from its checkpoint, if it keeps any.
        """
