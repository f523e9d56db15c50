"""The controller: a Ray actor that has workers hold what is to be served, and makes the table.

It keeps nothing that it could not be told again, by the control process what to serve and by the
workers how they are, so its death costs a pause in news and no more: it goes on from the last
table.

Knows nothing of HTTP, of engines' processes, or of who reads the table.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import ray

from server.caretaker import Caretaker
from server.errors import NotBegunError
from server.orders import Orders, Post, Rules
from server.table import RoutingTable

LEASE_S = 300.0
"""Seconds without a question from a control process after which nobody owns the workers; long
enough for one that cannot start, as its bundle cannot be reached for a while."""
LEASE_POLL_S = 5.0


class Controller:
    """The actor's body."""

    def __init__(self, run: str = "") -> None:
        """Know nothing yet.

        What to serve comes by `direct`: Ray keeps large constructor arguments in its object store
        only until the actor has begun, and so could not start it again (ray issue 53727).

        Args:
            run: prefix of the names of all actors of this run; empty: nobody is ended when the
                control process is gone.
        """
        self._run = run
        self._caretaker: Caretaker | None = None
        self._asked = time.monotonic()
        if run:
            threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    async def direct(
        self,
        orders: Orders,
        posts: Mapping[str, Post],
        rules: Rules,
        last: RoutingTable | None = None,
    ) -> None:
        """Look after these workers, and have them hold this, from now on.

        Args:
            orders: what is to be held and served.
            posts: the workers by id; one that is not there any more is forgotten, not ended.
            rules: how to go about it.
            last: the table of a controller before this one: for adopted workers it holds until
                they say otherwise, and versions grow from it.
        """
        self._asked = time.monotonic()
        if self._caretaker is None:
            self._caretaker = Caretaker(orders, posts, rules, last)
        else:
            await self._caretaker.direct(orders, posts)

    async def demand(self, rates: Mapping[str, float]) -> None:
        """Place experts by what they were asked for of late: engine seconds per second by id."""
        self._asked = time.monotonic()
        if self._caretaker is not None:
            self._caretaker.note_demand(rates)

    async def table(self, after_version: int, timeout_s: float) -> RoutingTable | None:
        """The table, once it is newer than `after_version`; none if it is not in time.

        Raises:
            NotBegunError: it has not been told what to serve since Ray started it.
        """
        self._asked = time.monotonic()
        if self._caretaker is None:
            raise NotBegunError("the controller waits to be told what to serve")
        return await self._caretaker.table(after_version, timeout_s)

    async def end(self) -> None:
        """Leave the workers alone."""
        caretaker, self._caretaker = self._caretaker, None
        if caretaker is not None:
            await caretaker.end()

    def _watch_lease(self) -> None:
        """End this run's actors when no control process has asked for long.

        They are detached, so that they outlive a control process until the next one; where the
        driver dies with it, on a cluster that is not its own, nobody else would end them.
        """
        while time.monotonic() - self._asked < LEASE_S:
            time.sleep(LEASE_POLL_S)
        end_actors(self._run, ray.get_runtime_context().get_actor_id())


def end_actors(run: str, last: str | None = None) -> None:
    """Kill the actors whose names begin with `run`; the one with the id `last` in the end."""
    remaining = []
    for name in ray.util.list_named_actors():
        if not name.startswith(run):
            continue
        try:
            actor = ray.get_actor(name)
        except ValueError:  # it has ended meanwhile
            continue
        if actor._actor_id.hex() == last:
            remaining.append(actor)
        else:
            ray.kill(actor, no_restart=True)
    for actor in remaining:
        ray.kill(actor, no_restart=True)


def create_controller(run: str) -> Any:
    """Create the controller's actor, or find it; Ray starts it again whenever it dies."""
    return (
        ray.remote(Controller)
        .options(
            name=f"{run}controller",
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
        )
        .remote(run)
    )
