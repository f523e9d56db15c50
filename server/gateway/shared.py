"""What all gateway processes of one endpoint know in common: a mapped file in the run directory.

Counts: a row for each process, which that process alone writes, so that nothing is locked; whoever
reads adds the rows up. A process that dies leaves a row behind; the driver empties it, and so does
the one that comes after it. Rates: one place for each key, written by whichever process the key
asks.

Numbers are eight bytes on an eight-byte boundary, which the machines that this runs on write and
read at once.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

logger = logging.getLogger(__name__)

WORD = 8
ROW_NAMES = 8192
"""Names that one process counts at a time; those at zero make room for others."""
_HEAD = 2
"""Words before a row's names: how often it was begun anew, and how many names it has."""
_ROW_WORDS = _HEAD + 2 * ROW_NAMES

RATE_PLACES = 65_536
LOCK_ATTEMPTS = 8


def _id_of(name: str) -> int:
    """A name as eight bytes, never 0: two of ten thousand names are the same once in 10^11."""
    return (
        int.from_bytes(blake2b(name.encode(), digest_size=WORD).digest(), "little", signed=True)
        or 1
    )


def _mapped(path: Path, words: int) -> tuple[mmap.mmap, memoryview, int]:
    """A file of so many words, as a mapping and as an array of words; it is made if need be."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(descriptor, words * WORD)  # the same for all; what it extends by is zero
    mapping = mmap.mmap(descriptor, words * WORD)
    return mapping, memoryview(mapping).cast("q"), descriptor


class SharedCounts:
    """Counts over all processes of an endpoint; see `server.gateway.counts.Counts`."""

    def __init__(self, path: Path, *, processes: int, number: int) -> None:
        """Map the file and empty this process' row.

        Args:
            path: the file, the same for all.
            processes: rows of it.
            number: this process' row.
        """
        self._mapping, self._words, descriptor = _mapped(path, processes * _ROW_WORDS)
        os.close(descriptor)
        self._start = number * _ROW_WORDS
        self._own: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self._identities: dict[str, int] = {}
        self._siblings = [
            _Sibling(self._words, other * _ROW_WORDS)
            for other in range(processes)
            if other != number
        ]
        self._begin_anew()

    def add(self, name: str, change: int) -> None:
        """One more or one less."""
        count = self._own.get(name, 0) + change
        self._own[name] = count
        place = self._places.get(name)
        if place is None:
            self._place(name)
        else:
            self._words[place] = count

    def of(self, name: str) -> int:
        """How many there are, in all processes."""
        count = self._own.get(name, 0)
        if self._siblings:
            identity = self._identities.get(name)
            if identity is None:
                identity = self._identities[name] = _id_of(name)
            for sibling in self._siblings:
                count += sibling.of(identity)
        return count

    def own(self) -> Mapping[str, int]:
        """What this process has."""
        return {name: count for name, count in self._own.items() if count}

    def close(self) -> None:
        """Give the mapping back."""
        for sibling in self._siblings:
            sibling.forget()
        self._words.release()
        self._mapping.close()

    def _place(self, name: str) -> None:
        used = self._words[self._start + 1]
        if used >= ROW_NAMES:
            self._begin_anew()
            return
        at = self._start + _HEAD + 2 * used
        self._words[at + 1] = self._own[name]
        self._words[at] = _id_of(name)
        self._words[self._start + 1] = used + 1  # last: readers look no further than this
        self._places[name] = at + 1

    def _begin_anew(self) -> None:
        """Write the row again with the names that still count; readers forget where names were."""
        words, start = self._words, self._start
        words[start + 1] = 0
        words[start] += 1
        self._own = {name: count for name, count in self._own.items() if count}
        self._places.clear()
        self._identities.clear()
        if len(self._own) > ROW_NAMES:
            logger.warning("%d names in flight: some are not shared", len(self._own))
        for name in list(self._own)[:ROW_NAMES]:
            self._place(name)


class _Sibling:
    """Another process' row, and where in it names were last seen."""

    def __init__(self, words: memoryview, start: int) -> None:
        self._words, self._start = words, start
        self._begun = -1
        self._seen = 0
        self._places: dict[int, int] = {}

    def of(self, identity: int) -> int:
        """Its count of a name."""
        words, start = self._words, self._start
        begun, used = words[start], words[start + 1]
        if begun != self._begun:
            self._places.clear()
            self._seen, self._begun = 0, begun
        if used != self._seen:
            for number in range(self._seen, used):
                at = start + _HEAD + 2 * number
                self._places[words[at]] = at + 1
            self._seen = used
        place = self._places.get(identity)
        return words[place] if place is not None else 0

    def forget(self) -> None:
        """Let go of the mapping."""
        self._words = memoryview(b"").cast("q")


def clear_row(path: Path, number: int) -> None:
    """Empty the row of a process that is dead, so that what it had in flight counts no longer."""
    with path.open("r+b") as file:
        file.seek(number * _ROW_WORDS * WORD)
        begun = int.from_bytes(file.read(WORD), "little", signed=True)
        file.seek(number * _ROW_WORDS * WORD)
        file.write((begun + 1).to_bytes(WORD, "little", signed=True) + bytes(WORD))


class SharedRates:
    """When each name may ask again, over all processes.

    The generic cell rate algorithm (ITU-T I.371, annex A): one moment per name, that at which it
    would have used up what it was given had it asked evenly. The moment is read and written under
    a lock of the file. A lock that is not to be had at once, since another process was suspended
    with it, is gone without: then two processes may let through one request more than the rate
    allows, each time, rather than that all of them stand still.
    """

    def __init__(self, path: Path) -> None:
        self._mapping, self._words, self._descriptor = _mapped(path, 2 * RATE_PLACES)
        self._places: dict[str, int] = {}

    def ask(self, name: str, per_minute: float, now: float) -> float:
        """Take one request; seconds to wait if there is none to take, else 0.

        Args:
            name: whose.
            per_minute: requests in a minute, evenly or all at once.
            now: seconds on the monotonic clock, which all processes of a machine share.
        """
        interval = 60e9 / per_minute
        nanoseconds = int(now * 1e9)
        locked = self._lock()
        try:
            place = self._places.get(name)
            if place is None:
                place = self._place(name)
            due = max(self._words[place], nanoseconds)
            early = due + interval - nanoseconds - max(60e9, interval)
            if early > 0:
                return float(early / 1e9)
            self._words[place] = int(due + interval)
            return 0.0
        finally:
            if locked:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give mapping and file back."""
        self._words.release()
        self._mapping.close()
        os.close(self._descriptor)

    def _lock(self) -> bool:
        for _ in range(LOCK_ATTEMPTS):
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            return True
        return False

    def _place(self, name: str) -> int:
        identity = _id_of(name)
        at = identity % RATE_PLACES
        for _ in range(RATE_PLACES):
            if self._words[2 * at] in (0, identity):
                self._words[2 * at] = identity
                self._places[name] = 2 * at + 1
                return 2 * at + 1
            at = (at + 1) % RATE_PLACES
        return 2 * at + 1  # more names than places: they share
