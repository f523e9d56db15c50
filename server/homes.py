"""Where experts live while they move: the new home holds them before the old one lets go. Pure.

A placement says where experts are to be. What workers are told to load, and what the table says,
is a home more for as long as a move takes:

- an expert whose homes are all out gets a shelter on a worker that is not, and keeps its homes;
- a home that a newer placement leaves out keeps its expert until another home has held it for a
  while, so that a worker that comes and goes does not make its experts travel each time;
- a home that lets go is none in the table, and holds the expert until nobody asks for it there.

Knows nothing of Ray, of clocks, or of what a worker does to hold an expert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from server.placement import ExpertDemand, Placement, Policy, WorkerCapacity, replan

Hosts = tuple[str, ...]
"""Worker ids, the first one preferred."""


def shelters(
    placement: Placement,
    experts: Sequence[ExpertDemand],
    workers: Sequence[WorkerCapacity],
    out: Collection[str],
    policy: Policy,
) -> dict[str, Hosts]:
    """Homes by expert id, with a shelter for each expert whose homes are all out.

    Args:
        placement: where the experts are at home.
        experts: all of the placement's.
        workers: all of them, those that are out too.
        out: ids of the workers that are not to be counted on now.
        policy: as for the placement.
    """
    standing = [worker for worker in workers if worker.id not in out]
    stranded = {e.id for e in experts if all(home in out for home in placement.homes[e.id])}
    if not stranded or not standing:
        return dict(placement.homes)
    found = replan(placement, experts, standing, policy).homes
    return {
        expert.id: placement.homes[expert.id]
        + (found[expert.id][:1] if expert.id in stranded else ())
        for expert in experts
    }


class Homes:
    """The homes of served names from one look to the next."""

    def __init__(self, settle_s: float, drain_s: float) -> None:
        """Nobody lives anywhere.

        Args:
            settle_s: seconds that a wanted home holds an expert before another lets it go.
            drain_s: seconds that a home that let go still holds the expert, for requests that
                are on their way.
        """
        self._settle_s = settle_s
        self._drain_s = drain_s
        self._left: dict[tuple[str, str], float] = {}
        self._homes: dict[str, Hosts] = {}
        self._held_since: dict[str, float] = {}

    def look(
        self,
        wanted: Mapping[str, Hosts],
        held: Mapping[str, Collection[str]],
        now: float,
    ) -> dict[str, Hosts]:
        """The homes as they are now, wanted ones first.

        Args:
            wanted: homes by served name, as planned.
            held: served names by worker, of the workers that answer; a worker that is missing
                here keeps nothing but what it is wanted for.
            now: seconds of a clock that only grows.
        """
        homes = {}
        for name, hosts in wanted.items():
            leaving = tuple(
                host
                for host in self._homes.get(name, ())
                if host not in hosts and name in held.get(host, ())
            )
            if not any(name in held.get(host, ()) for host in hosts):
                self._held_since.pop(name, None)
            elif now - self._held_since.setdefault(name, now) >= self._settle_s:
                leaving = ()
            homes[name] = hosts + leaving
        self._held_since = {n: since for n, since in self._held_since.items() if n in homes}
        self._note_left(homes, held, now)
        self._homes = homes
        return homes

    def found(self, host: str, names: Collection[str], now: float) -> None:
        """Take what a host turns out to hold without being its home as left just now.

        For whoever begins with hosts that others have told what to hold: those may have let an
        expert go a moment ago, with requests on their way.
        """
        for name in names:
            if host not in self._homes.get(name, ()):
                self._left.setdefault((name, host), now)

    def holds(self, name: str, host: str) -> bool:
        """Whether a host is a home of an expert, or was until lately."""
        return host in self._homes.get(name, ()) or (name, host) in self._left

    def _note_left(
        self, homes: Mapping[str, Hosts], held: Mapping[str, Collection[str]], now: float
    ) -> None:
        for name, hosts in self._homes.items():
            for host in hosts:
                self._left.setdefault((name, host), now)
        self._left = {
            (name, host): at
            for (name, host), at in self._left.items()
            if name in homes
            and host not in homes[name]
            and name in held.get(host, ())
            and now - at < self._drain_s
        }
