"""What is known of a training run at any moment, from the pool's events alone.

Pure but for the clock it is given. Knows no terminal, no file and no Ray.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from configs.manifest import ExpertCard
from deploy.training_pool import Meter, Pool, Training
from expert_trainer.types import (
    ActorLost,
    ActorUp,
    ExpertFailed,
    ExpertFinished,
    ExpertMeasured,
    ExpertProgress,
    ExpertReused,
    ExpertStarted,
    JobFinished,
    PoolEnded,
    PoolStarted,
    TrainEvent,
)


@dataclass
class Actor:
    """An actor that is up, and what it is at work on."""

    name: str
    node: str
    device: str
    training: dict[str, Training] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Speed of its experts together, as they reported it last."""
        return sum(member.tokens_per_second for member in self.training.values())

    @property
    def steps_left(self) -> int:
        """Steps until its longest expert is done."""
        return max((member.steps_left for member in self.training.values()), default=0)


@dataclass(frozen=True)
class Counts:
    """Where the experts of the pool at work stand; the parts add up to `all`."""

    all: int
    done: int
    running: int
    queued: int
    failed: int
    """Given up; what is to be tried again counts as queued."""
    reused: int


class TrainingState:
    """A run as its events tell of it: call the object with each of them.

    A run may have several pools, one after the other: counts, speeds and the time left are those
    of the last one; what was spent is counted over all of them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.began = clock()
        self.actors: dict[str, Actor] = {}
        self.training: dict[str, Training] = {}
        self.pool: Pool | None = None
        self.cards: dict[str, ExpertCard] = {}
        """Of the experts that are finished, now or before."""
        self.reused: set[str] = set()
        self.retries = 0
        """Tries that failed and were not the last."""
        self.tokens_trained = 0
        """In this run, in vain or not."""
        self.tokens_wasted = 0
        """Of these, those trained again after a failure and those of experts given up."""
        self.actor_seconds = 0.0
        self.computing_seconds = 0.0
        self._lost: dict[str, int] = {}
        """Tokens that a failed try had behind it, until the next one says where it goes on."""
        self._spent: Counter[str] = Counter()
        """Tokens that this run trained for experts not finished yet, without those wasted."""

    def __call__(self, event: TrainEvent) -> None:
        """Take note of an event."""
        match event:
            case PoolStarted():
                meter = Meter(self._clock())
                self.pool = Pool(event.queued, event.actors, event.steps, meter)
            case ActorUp():
                self.actors[event.actor] = Actor(event.actor, event.node, event.device)
            case ActorLost():
                self.actors.pop(event.actor, None)
            case ExpertReused():
                self.cards[event.id] = event.card
                self.reused.add(event.id)
            case PoolEnded():
                self.actor_seconds += event.seconds
                self.computing_seconds += event.computing
                self.actors.clear()
                self.training.clear()
                if self.pool:
                    self.pool.ended = True
            case _:
                self._of_an_expert(event)

    def _of_an_expert(
        self,
        event: ExpertStarted
        | ExpertProgress
        | ExpertMeasured
        | ExpertFinished
        | ExpertFailed
        | JobFinished,
    ) -> None:
        if isinstance(event, ExpertStarted):
            self._start(event)
            return
        member = self.training.get(event.id)
        match event:
            case ExpertProgress() if member:
                member.loss = event.loss
                member.tokens_per_second = event.tokens_per_second
                self._move(member, event.step, event.tokens)
            case ExpertMeasured() if member:
                member.heldout = event.loss
            case ExpertFinished():
                self.cards[event.id] = event.card
                if member:
                    self._move(member, event.card.steps, event.card.tokens_seen)
                    if self.pool:
                        self.pool.saved += max(member.steps - event.card.steps, 0)
                self._end(event.id)
            case JobFinished():
                if member:
                    self._move(member, member.steps, member.tokens)
                self._end(event.id)
            case ExpertFailed():
                self._fail(event, member)

    def _start(self, event: ExpertStarted) -> None:
        member = Training(event.id, event.actor, event.attempt, event.steps, self._clock())
        self.training[event.id] = member
        if event.actor in self.actors:
            self.actors[event.actor].training[event.id] = member
        if self.pool:
            self.pool.started[event.id] = event.steps
            self.pool.again.discard(event.id)

    def _move(self, member: Training, step: int, tokens: int) -> None:
        """Count what was trained since the last report.

        The first report of an expert that goes on from a checkpoint holds what an earlier try
        did too; only what its speed makes possible since it was taken up counts then.
        """
        now = self._clock()
        steps_now, tokens_now = float(step - member.step), tokens - member.tokens
        if not member.step and tokens and member.tokens_per_second:
            share = min(1.0, member.tokens_per_second * (now - member.since) / tokens)
            steps_now, tokens_now = step * share, round(tokens * share)
        if (before := self._lost.pop(member.id, None)) is not None:
            again = min(max(before - (tokens - tokens_now), 0), self._spent[member.id])
            self.tokens_wasted += again
            self._spent[member.id] -= again
        self.tokens_trained += max(tokens_now, 0)
        self._spent[member.id] += max(tokens_now, 0)
        if self.pool:
            self.pool.meter.add(now, max(tokens_now, 0), max(steps_now, 0.0))
        member.step, member.tokens = step, tokens

    def _end(self, expert: str) -> None:
        self._drop(expert)
        self._spent.pop(expert, None)
        if self.pool:
            self.pool.done += 1

    def _fail(self, event: ExpertFailed, member: Training | None) -> None:
        tokens = max(member.tokens if member else 0, self._lost.pop(event.id, 0))
        self._drop(event.id)
        if event.final:
            self.tokens_wasted += self._spent.pop(event.id, 0)
            if self.pool:
                self.pool.again.discard(event.id)
                self.pool.failed += 1
        else:
            self.retries += 1
            self._lost[event.id] = tokens
            if self.pool:
                self.pool.again.add(event.id)

    def _drop(self, expert: str) -> None:
        member = self.training.pop(expert, None)
        if member and member.actor in self.actors:
            self.actors[member.actor].training.pop(expert, None)

    @property
    def starting(self) -> int:
        """Actors that were asked for and are not up yet."""
        if self.pool is None or self.pool.ended:
            return 0
        return max(self.pool.actors - len(self.actors), 0)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return self._clock() - self.began

    @property
    def counts(self) -> Counts:
        """Experts by what has become of them."""
        reused, running = len(self.reused), len(self.training)
        if self.pool is None:
            return Counts(reused, 0, 0, 0, 0, reused)
        done, failed = self.pool.done, self.pool.failed
        queued = max(self.pool.queued - done - failed - running, 0)
        return Counts(self.pool.queued + reused, done, running, queued, failed, reused)

    @property
    def tokens_per_second(self) -> float:
        """Of all actors together, over the last minute."""
        return self.pool.meter.rates(self._clock())[0] if self.pool else 0.0

    @property
    def share_done(self) -> float:
        """Share of the pool's steps that are behind it, from 0 to 1."""
        return self.pool.share_done(self.training.values()) if self.pool else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time to the pool's end; none before its speed is known."""
        if self.pool is None:
            return None
        return self.pool.seconds_left(self.training.values(), self._clock())

    @property
    def steps_known(self) -> bool:
        """Whether the pool said how many steps it has; if not, the time left is an upper bound."""
        return self.pool is None or self.pool.steps > 0
