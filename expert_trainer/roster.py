"""The actors of a pool: started where there is room, ended when not trusted, buried when dead.

A job is somebody else's only once the process that had it is gone for certain, so no two actors
ever work on one member. Knows nothing of what actors report.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator

from configs.schema import RunConfig
from expert_trainer.actor import Actor
from expert_trainer.backlog import Backlog, part
from expert_trainer.base import resolve_base
from expert_trainer.crew import MAX_FAILED_STARTS, Node, Starts, reconcile
from expert_trainer.errors import PoolError, TrainerError, describe
from expert_trainer.runtime import alive_nodes, free_resources
from expert_trainer.schedule import Crew
from expert_trainer.trainer import MakeBench, Opened, end_trainer, start_trainer
from expert_trainer.types import ActorLost, ActorUp, ExpertFailed

logger = logging.getLogger(__name__)

TEND_S = 2.0
"""Seconds between two looks at the cluster's nodes."""
SETTLE_S = 1.0
"""Seconds from an actor's death to the verdict on its jobs: its node's end may be known by then."""
WAIT_S = 30.0
"""Seconds without any actor after which what is waited for is told, again and again."""


class Roster:
    """All actors that are starting, working, idle, or not yet known to be dead."""

    def __init__(self, config: RunConfig, crew: Crew, make_bench: MakeBench | None) -> None:
        """Nobody is there; `tend` starts them."""
        base = resolve_base(config.base)  # actors may run in another directory
        self._config = config.model_copy(update={"base": base})
        self._crew = crew
        self._make_bench = make_bench
        self._tag = uuid.uuid4().hex[:6]
        self._started = 0
        self._starts = Starts()
        self._nodes: dict[str, Node] = {}
        self._staffed_at = time.monotonic()
        """When there was an actor at last, or the lack of one was told."""
        self.actors: list[Actor] = []
        self.tend_at = 0.0
        """When `tend` is due, by the monotonic clock."""

    def tend(self, backlog: Backlog) -> Iterator[ActorLost | ExpertFailed]:
        """Judge the actors that fell, then fill the places that are free while there is work.

        Raises:
            PoolError: actors start on none of the nodes.
            TrainerError: likewise, with the cause that actors gave, such as BaseModelError.
        """
        now = time.monotonic()
        self.tend_at = now + TEND_S
        self._nodes = {node.id: node for node in alive_nodes()}
        for actor in list(self.actors):
            node_is_gone = actor.node.id not in self._nodes
            settled = actor.dead_at is not None and now >= actor.dead_at + _patience(actor)
            if settled or (node_is_gone and (actor.idle or actor.fallen)):
                yield from self._bury(actor, backlog, node_is_gone=node_is_gone)
            elif actor.fallen and actor.awaited is None and actor.dead_at is None:
                actor.ask()
        self._fill_places(len(backlog) + sum(actor.jobs for actor in self.actors))
        if any(actor.opened for actor in self.actors):
            self._staffed_at = now
        elif now - self._staffed_at >= WAIT_S:
            self._staffed_at = now
            self._tell_what_is_missing(backlog.open)

    def welcome(self, actor: Actor, opened: Opened) -> ActorUp:
        """An actor has started."""
        actor.opens()
        self._starts.succeeded(actor.node.id)
        shared = sum(node.host == actor.node.host for node in self._nodes.values()) > 1
        where = actor.node.address if shared else actor.node.host
        return ActorUp(actor.name, where, opened.device, opened.pid)

    def end(self, actor: Actor, cause: Exception) -> None:
        """Trust an actor no more: end its process, and wait until that is gone."""
        actor.fall(cause)
        end_trainer(actor.handle)
        actor.ask()

    def dead(self, actor: Actor, cause: Exception) -> None:
        """An actor's process is gone for certain."""
        actor.fall(cause)
        actor.dies()
        self.tend_at = min(self.tend_at, time.monotonic() + _patience(actor))

    def close(self) -> None:
        """End all actors."""
        for actor in self.actors:
            end_trainer(actor.handle)
        self.actors.clear()

    def _fill_places(self, jobs: int) -> None:
        usable = self._starts.usable(list(self._nodes.values()))
        taken = [actor.place for actor in self.actors]
        wanted = min(jobs, self._crew.most or jobs)
        for place in reconcile(usable, taken, self._crew.share, wanted):
            name = f"trainer-{self._tag}-{self._started}"
            self._started += 1
            handle = start_trainer(name, place, self._crew.share)
            opening = handle.open.remote(self._config, self._make_bench)
            self.actors.append(Actor(name, self._nodes[place.node], place, handle, opening))
        cause = self._starts.cause(list(self._nodes.values()))
        if self.actors or cause is None:
            return
        if isinstance(cause, TrainerError) and not isinstance(cause, PoolError):
            raise cause
        raise PoolError(f"no training actor stays up: {describe(cause)}; see Ray's worker logs")

    def _bury(
        self, actor: Actor, backlog: Backlog, *, node_is_gone: bool
    ) -> Iterator[ActorLost | ExpertFailed]:
        """Take a dead actor off: its jobs go back, the running one as failed if its node stands."""
        self.actors.remove(actor)
        cause = None if node_is_gone else actor.fallen
        gone = f"its node {actor.node.address} is gone"
        yield ActorLost(actor.name, gone if cause is None else describe(cause))
        if cause is not None and not actor.opened and self._starts.failed(actor.node.id, cause):
            logger.warning(
                "%s (%s) gets no more training actors: the last %d did not start: %s",
                actor.node.address,
                actor.node.host,
                MAX_FAILED_STARTS,
                describe(cause),
            )
        if actor.deck is not None:
            backlog.put_back(actor.deck.assignment.job)
        if actor.running is not None:
            job, members = actor.running.assignment.job, actor.running.assignment.unfinished
            if cause is None:
                backlog.put_back(part(job, members))
            else:
                yield from backlog.fail(job, members, cause)

    def _tell_what_is_missing(self, members: int) -> None:
        share = self._crew.share
        if self.actors:
            logger.warning(
                "waiting for a training actor, which needs %g GPUs and %d cores; "
                "free on the Ray cluster are %s",
                share.gpus,
                share.cpus,
                free_resources(),
            )
        else:
            logger.warning(
                "no node of the Ray cluster has the %g GPUs and %d cores of a training actor; "
                "waiting for one with %d experts to go",
                share.gpus,
                share.cpus,
                members,
            )


def _patience(actor: Actor) -> float:
    """Seconds from an actor's death to the verdict on it."""
    return SETTLE_S if actor.jobs else 0.0
