"""How many requests a worker gets at once, and in which order the others wait for it.

A `Lane` lets at most so many requests in; the rest wait and are let in fairly between tenants, by
start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): a request is tagged with the moment
at which a tenant of its weight would be served if everybody had a share, and the smallest tag is
next. Where a worker holds more experts than its engine has slots, requests are grouped: no more
experts than slots are in flight, since an engine lets requests for the experts that run overtake
all others, for ever if need be. An expert that has waited too long gets the next slot: another's
is closed to newcomers until it has drained.

This module is pure: it knows no task, no engine and no clock but the one that it is handed.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator

SMOOTHING = 0.1
"""Weight of the newest request in the mean time of service."""

COMPACT = 32
"""Places of a queue that may be held by those who left it before they are cleared away."""


class Waiter:
    """One request that waits. `woken` is called once: with its ticket, or none: choose anew."""

    __slots__ = ("_order", "arrived", "line", "tag", "ticket", "waiting", "woken")

    def __init__(
        self,
        line: Group,
        tag: float,
        order: int,
        arrived: float,
        woken: Callable[[Group | None], None],
    ) -> None:
        self.line = line
        """The group that it waits in."""
        self.tag = tag
        self._order = order
        self.arrived = arrived
        self.woken = woken
        self.ticket: Group | None = None
        """Set once it has been let in; whoever holds it has to leave the lane."""
        self.waiting = True

    def __lt__(self, other: Waiter) -> bool:
        return (self.tag, self._order) < (other.tag, other._order)


class Group:
    """The requests of one expert on one worker; a request that was let in holds it as its ticket.

    Those that take no slot have a group of their own, whose key is empty.
    """

    __slots__ = ("_by_arrival", "_by_tag", "active", "closed", "key", "waiting")

    def __init__(self, key: str) -> None:
        self.key = key
        self.active = 0
        self.closed = False
        """Whether nobody is let in until all who are have left."""
        self.waiting = 0
        self._by_tag: list[Waiter] = []
        self._by_arrival: deque[Waiter] = deque()

    def push(self, waiter: Waiter) -> None:
        """One more waits."""
        heapq.heappush(self._by_tag, waiter)
        self._by_arrival.append(waiter)
        self.waiting += 1

    def head(self) -> Waiter:
        """Who is next; the group has somebody waiting."""
        while not self._by_tag[0].waiting:
            heapq.heappop(self._by_tag)
        return self._by_tag[0]

    def since(self) -> float:
        """When the one came who waits longest; the group has somebody waiting."""
        while not self._by_arrival[0].waiting:
            self._by_arrival.popleft()
        return self._by_arrival[0].arrived

    def __iter__(self) -> Iterator[Waiter]:
        return (waiter for waiter in self._by_arrival if waiter.waiting)

    def remove(self, waiter: Waiter) -> None:
        """One waits no longer."""
        waiter.waiting = False
        self.waiting -= 1
        if len(self._by_tag) > 2 * self.waiting + COMPACT or not self.waiting:
            self._by_tag = [w for w in self._by_tag if w.waiting]
            heapq.heapify(self._by_tag)
        if len(self._by_arrival) > 2 * self.waiting + COMPACT or not self.waiting:
            self._by_arrival = deque(w for w in self._by_arrival if w.waiting)


class Lane:
    """The way to one worker."""

    def __init__(
        self, *, limit: int, max_queue: int, group_wait_s: float, clock: Callable[[], float]
    ) -> None:
        """A lane in which nobody is.

        Args:
            limit: requests in flight at the most.
            max_queue: requests waiting at the most.
            group_wait_s: seconds that an expert waits for a slot before one is cleared for it.
            clock: the moment, in seconds.
        """
        self.limit = limit
        self.max_queue = max_queue
        self.slots: int | None = None
        """Experts in flight at the most; none: any number, and requests are not grouped."""
        self.active = 0
        self.waiting = 0
        self.service_s = 0.0
        """Mean time that a request is in flight, the newest counting most; 0: none has ended."""
        self._group_wait_s = group_wait_s
        self._clock = clock
        self._groups: dict[str, Group] = {}
        self._in_line: dict[str, Group] = {}
        self._in_slots: dict[str, Group] = {}
        self._order = 0
        self._virtual = 0.0
        self._finish: dict[str, float] = {}
        self._overdue_from = math.inf

    def regroup(self, slots: int | None) -> None:
        """The engine has so many slots for more experts than that; none: it holds them all."""
        if slots != self.slots:
            self.slots = slots
            self.dissolve()
        idle = [k for k, g in self._groups.items() if not g.active and not g.waiting]
        for key in idle:
            del self._groups[key]

    def enter(self, expert: str | None) -> Group | None:
        """Let a request in at once, if there is room and nobody is before it.

        Args:
            expert: served name of the expert that it is for; none for the base.
        """
        key = expert if self.slots is not None and expert is not None else ""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(key)
        if self.waiting and self._clock() >= self._overdue_from:
            self._clear_slots()
        if not self._has_room(group):
            return None
        self._start(group)
        return group

    def enter_behind(self, expert: str | None, below: int) -> Group | None:
        """Let a background request in at once, if it takes nobody's place: nobody waits, and fewer
        than `below` are in flight, live requests counted."""
        if self.waiting or self.active >= below:
            return None
        return self.enter(expert)

    def queue(
        self, expert: str | None, tenant: str, weight: float, woken: Callable[[Group | None], None]
    ) -> Waiter | None:
        """Let a request wait that could not enter; none if too many wait already."""
        if self.waiting >= self.max_queue:
            return None
        key = expert if self.slots is not None and expert is not None else ""
        group = self._groups.setdefault(key, Group(key))
        tag = max(self._virtual, self._finish.get(tenant, 0.0))
        self._finish[tenant] = tag + 1.0 / weight
        self._order += 1
        waiter = Waiter(group, tag, self._order, self._clock(), woken)
        group.push(waiter)
        self.waiting += 1
        self._in_line[key] = group
        self._overdue_from = min(self._overdue_from, waiter.arrived + self._group_wait_s)
        return waiter

    def leave(self, group: Group, seconds: float | None = None) -> None:
        """A request that was let in is over; `seconds` it took, if it was served to the end."""
        group.active -= 1
        self.active -= 1
        if not group.active and group.key:
            group.closed = False
            self._in_slots.pop(group.key, None)
            if group.waiting:
                self._overdue_from = min(self._overdue_from, group.since() + self._group_wait_s)
        if seconds is not None:
            mean = self.service_s
            self.service_s = mean + SMOOTHING * (seconds - mean) if mean else seconds
        if self.waiting:
            self._admit()

    def abandon(self, waiter: Waiter) -> None:
        """A request waits no longer, for it was given up."""
        if waiter.waiting:
            self._take_out(waiter)

    def dissolve(self) -> None:
        """Send everybody away who waits, to choose anew, the next ones first."""
        waiters = sorted(w for group in self._in_line.values() for w in group)
        for waiter in waiters:
            self._take_out(waiter)
        for waiter in waiters:
            waiter.woken(None)

    def expected_wait(self, expert: str | None) -> float:
        """Seconds that a request would wait now, from the queue and the mean time of service."""
        key = expert if self.slots is not None and expert is not None else ""
        group = self._groups.get(key)
        if self._has_room(group or Group(key)):
            return 0.0
        wait = (self.waiting + 1) * self.service_s / max(1, self.active)
        if key and key not in self._in_slots:
            wait += self._group_wait_s
        return wait

    def upcoming(self) -> str | None:
        """The expert that waits for a slot and gets the next one, if nobody else comes; none if
        none waits for a slot."""
        if self.slots is None or not self._in_line:
            return None
        outside = [g for g in self._in_line.values() if g.key and not g.active]
        if not outside:
            return None
        late = self._late()
        return (min(late, key=Group.since) if late else min(outside, key=Group.head)).key

    def in_slots(self) -> list[str]:
        """The experts in flight, where requests are grouped."""
        return list(self._in_slots)

    def waits_outside(self, expert: str) -> bool:
        """Whether an expert waits that is in no slot."""
        group = self._in_line.get(expert)
        return group is not None and not group.active

    def _has_room(self, group: Group) -> bool:
        """Whether a newcomer of a group may enter. Whoever waits could not, so it passes nobody
        who could have entered before it."""
        if self.active >= self.limit or group.waiting or group.closed:
            return False
        slots = self.slots
        return slots is None or not group.key or group.active > 0 or len(self._in_slots) < slots

    def _start(self, group: Group) -> None:
        self.active += 1
        group.active += 1
        if group.active == 1 and group.key:
            self._in_slots[group.key] = group

    def _take_out(self, waiter: Waiter) -> None:
        group = waiter.line
        group.remove(waiter)
        self.waiting -= 1
        if not group.waiting:
            del self._in_line[group.key]
        if not self.waiting:
            self._virtual = 0.0
            self._finish.clear()
            self._overdue_from = math.inf

    def _admit(self) -> None:
        """Let in whoever may come in now."""
        if self._clock() >= self._overdue_from:
            self._clear_slots()
        while self.waiting and self.active < self.limit:
            group = self._next_group()
            if group is None:
                return
            waiter = group.head()
            self._virtual = max(self._virtual, waiter.tag)
            self._take_out(waiter)
            self._start(group)
            waiter.ticket = group
            waiter.woken(group)

    def _next_group(self) -> Group | None:
        """Whose turn it is: of an expert that has waited too long for a slot, if one is free; else
        of those that may come in the one with the smallest tag."""
        slots = self.slots
        if slots is None:
            return next(iter(self._in_line.values()))
        free = len(self._in_slots) < slots
        if free and self._clock() >= self._overdue_from and (late := self._late()):
            return min(late, key=Group.since)
        may = [g for g in self._in_line.values() if self._may_enter(g, free=free)]
        return min(may, key=Group.head) if may else None

    def _may_enter(self, group: Group, *, free: bool) -> bool:
        if not group.key:
            return True
        return not group.closed if group.active else free

    def _late(self) -> list[Group]:
        """The experts in no slot that have waited for one for too long."""
        by = self._clock() - self._group_wait_s
        return [g for g in self._in_line.values() if g.key and not g.active and g.since() <= by]

    def _clear_slots(self) -> None:
        """Close as many experts' groups as there are others that have waited for too long."""
        outside = [g for g in self._in_line.values() if g.key and (not g.active or g.closed)]
        if self.slots is None or not outside:
            self._overdue_from = math.inf
            return
        self._overdue_from = min(g.since() for g in outside) + self._group_wait_s
        late = len(self._late())
        closed = sum(g.closed for g in self._in_slots.values())
        for _ in range(late - closed - (self.slots - len(self._in_slots))):
            # Of equals the first, which has had its slot for the longest time.
            open_ = [g for g in self._in_slots.values() if not g.closed]
            if not open_:
                return
            min(open_, key=lambda g: g.waiting).closed = True
