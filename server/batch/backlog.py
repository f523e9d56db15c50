"""Lines that wait to be asked, by target: whose turn it is, and what was given back.

Only some lines of each target are in memory, the others are in the ledger. Knows nothing of
engines or of time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from server.batch.ledger import Ledger
from server.batch.types import Line

FETCH = 512
"""Lines of one target that are read from the ledger at once."""
SUSPECT = 2
"""Losses after which a line is a suspect: it may be what takes engines along. Suspects are asked
apart from others, in blocks a quarter as large after each loss, until the culprit is alone."""


@dataclass
class _Queue:
    """Lines of one target."""

    unread: int
    """In the ledger and not looked at yet."""
    cursor: int = 0
    ready: deque[Line] = field(default_factory=deque)
    suspects: deque[Line] = field(default_factory=deque)

    @property
    def waiting(self) -> int:
        return self.unread + len(self.ready) + len(self.suspects)


class Backlog:
    """All lines that are left."""

    def __init__(self, ledger: Ledger) -> None:
        """Those that the ledger says are pending."""
        self._ledger = ledger
        self._queues = {target: _Queue(count) for target, count in ledger.remaining().items()}
        self._current: dict[str, str] = {}
        self._in_hand = 0

    @property
    def over(self) -> bool:
        """Whether nothing waits and nothing is in hand."""
        return not self._in_hand and not any(q.waiting for q in self._queues.values())

    def remaining(self) -> dict[str, int]:
        """Lines that wait, by target."""
        return {target: q.waiting for target, q in self._queues.items() if q.waiting}

    def take(self, group: str, holds: Set[str] | None, limit: int) -> list[Line]:
        """Lines for a group: of the target it is at, and when that has no more, of the next.

        The next is the one with the most lines for each group that is at it. Suspects come among
        themselves.

        Args:
            group: whoever asks.
            holds: targets that it can ask; none: any.
            limit: lines at the most.
        """
        lines: list[Line] = []
        while len(lines) < limit and (target := self._target(group, holds)) is not None:
            self._current[group] = target
            queue = self._queues[target]
            self._read(target, queue)
            if queue.ready:
                room = limit - len(lines)
                lines += [queue.ready.popleft() for _ in range(min(room, len(queue.ready)))]
            elif queue.suspects:
                if not lines:
                    lines = _suspects(queue, limit)
                break
        self._in_hand += len(lines)
        return lines

    def _read(self, target: str, queue: _Queue) -> None:
        """Have lines of a target in memory, if there are any."""
        if queue.ready or not queue.unread:
            return
        read = self._ledger.to_ask(target, queue.cursor, FETCH)
        queue.ready.extend(read)
        # none where it was finished or given to another meanwhile
        queue.unread = queue.unread - len(read) if read else 0
        queue.cursor = read[-1].number if read else queue.cursor

    def done(self, lines: int = 1) -> None:
        """So many lines in hand are over."""
        self._in_hand -= lines

    def give_back(self, line: Line) -> None:
        """A line in hand is to be asked again, of whatever target it has now."""
        self._in_hand -= 1
        queue = self._queues.setdefault(line.target, _Queue(0))
        if line.losses >= SUSPECT:
            queue.suspects.append(line)
        else:
            queue.ready.append(line)

    def drop(self, target: str) -> list[Line]:
        """All lines of a target that wait, taken out."""
        queue = self._queues.pop(target, None)
        if queue is None:
            return []
        lines = [*queue.ready, *queue.suspects]
        while read := self._ledger.to_ask(target, queue.cursor, FETCH) if queue.unread else []:
            lines += read
            queue.cursor = read[-1].number
        return lines

    def _target(self, group: str, holds: Set[str] | None) -> str | None:
        current = self._current.pop(group, None)
        if current is not None and self._open(current, holds):
            return current
        at_it: Mapping[str, int] = Counter(self._current.values())
        best, most = None, 0.0
        for target, queue in self._queues.items():
            share = queue.waiting / (1 + at_it.get(target, 0))
            if share > most and self._open(target, holds):
                best, most = target, share
        return best

    def _open(self, target: str, holds: Set[str] | None) -> bool:
        queue = self._queues.get(target)
        return queue is not None and queue.waiting > 0 and (holds is None or target in holds)


def _suspects(queue: _Queue, limit: int) -> list[Line]:
    size = max(1, limit >> 2 * (queue.suspects[0].losses - SUSPECT + 1))
    return [queue.suspects.popleft() for _ in range(min(size, len(queue.suspects)))]
