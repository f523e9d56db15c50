"""Who asks: API keys, what each may do, and how much.

Knows headers and numbers, no request's body and no engine.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

from server.errors import KeysError
from server.gateway.counts import Counts, LocalCounts
from server.gateway.errors import RateLimitedError, UnauthorizedError
from server.keys import KeyEntry, digest_of, read_keys

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
"""Seconds between two looks at the keys' file: a key that is revoked works no longer than that."""
CONCURRENT_RETRY_S = 1
NO_DIGEST = bytes(32)

ON_BEHALF = b"x-introvert-tenant"
"""Header in which whoever has the engines' key says whose request it is."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """The holder of one API key."""

    name: str = ""
    """As the keys' file says; empty: nobody in particular, where no keys are asked for."""
    weight: float = 1.0
    """Share of a busy worker that it gets, relative to the others'."""
    experts: frozenset[str] | None = None
    """Ids of the experts (and `base`) that it may ask; none: all."""
    requests_per_minute: float | None = None
    """None: no limit."""
    concurrent: int | None = None
    """Requests that it may have running; none: no limit."""

    def may_ask(self, expert: str) -> bool:
        """Whether it may have answers of this expert, or of `base`."""
        return self.experts is None or expert in self.experts


ANYBODY = Tenant()


class Rates(Protocol):
    """When each name may ask again."""

    def ask(self, name: str, per_minute: float, now: float) -> float:
        """Take one request; seconds to wait if there is none to take, else 0."""
        ...


class LocalRates:
    """Rates of one process; see `server.gateway.shared.SharedRates`."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}

    def ask(self, name: str, per_minute: float, now: float) -> float:
        """Take one request, if there is one to take."""
        interval = 60.0 / per_minute
        due = max(self._due.get(name, 0.0), now)
        early = due + interval - now - max(60.0, interval)
        if early > 1e-9:
            return early
        self._due[name] = due + interval
        return 0.0


class Keyring:
    """The keys that are known. Without a file of them, everybody is `ANYBODY`."""

    def __init__(
        self,
        keys_file: Path | None = None,
        *,
        counts: Counts | None = None,
        rates: Rates | None = None,
        engine_key: str | None = None,
    ) -> None:
        """Read the file.

        Args:
            keys_file: see `server.keys`; none: no keys are asked for.
            counts: requests running, by key; default: of this process alone.
            rates: what each key has asked; default: of this process alone.
            engine_key: the run's own, whose holder may ask on behalf of any tenant; none: nobody.

        Raises:
            KeysError: the file cannot be used; all mistakes at once.
        """
        self._file = keys_file
        self._counts = counts or LocalCounts()
        self._rates = rates or LocalRates()
        self._seen = _identity(keys_file) if keys_file else None
        self._fault = ""
        self._engine_digest = digest_of(engine_key.encode()) if engine_key else None
        self._named: dict[str, Tenant] = {}
        self._tenants: dict[bytes, tuple[bytes, Tenant]] = {}
        if keys_file is not None:
            self._use(read_keys(keys_file))

    def identify(self, headers: Sequence[tuple[bytes, bytes]]) -> Tenant:
        """Whose request it is, by its `Authorization: Bearer` or `x-api-key`.

        The time it takes tells nothing of the keys. The key is looked up by its SHA-256, and who
        guesses cannot steer that towards a stored one, since that would be to invert it; Python
        hashes bytes with a secret of the process; and what is found is compared in constant time.
        Comparing with all keys in turn would be no safer, and 0.3 ms a request at a thousand keys.

        Raises:
            UnauthorizedError: no key, or one that is not known.
        """
        if self._file is None:
            return ANYBODY
        key = bearer_of(headers)
        if key is None:
            raise UnauthorizedError(
                "An API key is needed. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            )
        digest = digest_of(key)
        stored, tenant = self._tenants.get(digest, (NO_DIGEST, ANYBODY))
        if not hmac.compare_digest(stored, digest):
            if self._engine_digest and hmac.compare_digest(self._engine_digest, digest):
                return self._on_behalf(headers)
            raise UnauthorizedError(
                "The API key is not known here. It may have been mistyped or revoked; ask whoever "
                "runs this service for another."
            )
        return tenant

    def _on_behalf(self, headers: Sequence[tuple[bytes, bytes]]) -> Tenant:
        """Whom a request with the engines' key is made for; how often it asks is not limited."""
        name = next((value for header, value in headers if header == ON_BEHALF), b"")
        tenant = self._named.get(name.decode("latin-1"))
        if tenant is None:
            raise UnauthorizedError(
                f"'{ON_BEHALF.decode()}' must name an API key that is known here; it may have been "
                "revoked."
            )
        return tenant

    def admit(self, tenant: Tenant) -> AbstractContextManager[None]:
        """Count one request of the tenant, from now until the context ends.

        Both limits hold over all gateway processes. Two of them that look at the very same moment
        may admit one request too many between them, `gateway.processes` - 1 at the worst.

        Raises:
            RateLimitedError: it has too many running, or has asked too often.
        """
        limit = tenant.concurrent
        if limit is not None and self._counts.of(tenant.name) >= limit:
            raise RateLimitedError(
                f"The API key '{tenant.name}' has {limit} requests running, as many as it may. "
                "Send the next when one has ended.",
                retry_after_s=CONCURRENT_RETRY_S,
            )
        if tenant.requests_per_minute is not None:
            wait_s = self._rates.ask(tenant.name, tenant.requests_per_minute, time.monotonic())
            if wait_s:
                raise RateLimitedError(
                    f"The API key '{tenant.name}' may ask {tenant.requests_per_minute:g} times a "
                    f"minute. Try again in {wait_s:.1f} s.",
                    retry_after_s=math.ceil(wait_s),
                )
        return nullcontext() if limit is None else _Running(self._counts, tenant.name)

    async def follow(self) -> None:
        """Read the file again whenever it changes, for ever; a mistake leaves the keys as they
        are."""
        while self._file is not None:
            await asyncio.sleep(LOOK_INTERVAL_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        assert self._file is not None, "there are keys to follow"
        identity = _identity(self._file)
        if identity == self._seen:
            return
        try:
            self._use(read_keys(self._file))
        except KeysError as error:
            if str(error) != self._fault:
                logger.error("the API keys stay as they were: %s", error)
            self._fault = str(error)  # tried again: it may be this process that cannot read it
        else:
            self._seen, self._fault = identity, ""
            logger.info("%d API keys", len(self._tenants))

    def _use(self, entries: Sequence[KeyEntry]) -> None:
        tenants, named = {}, {}
        for entry in entries:
            digest = bytes.fromhex(entry.sha256)
            tenants[digest] = (digest, _tenant(entry))
            named[entry.name] = replace(_tenant(entry), requests_per_minute=None, concurrent=None)
        self._tenants, self._named = tenants, named  # at once: another thread reads


class _Running:
    """One request of a tenant."""

    __slots__ = ("_counts", "_name")

    def __init__(self, counts: Counts, name: str) -> None:
        self._counts, self._name = counts, name

    def __enter__(self) -> None:
        self._counts.add(self._name, 1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._counts.add(self._name, -1)


def bearer_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key that a request shows: of `Authorization: Bearer`, else of `x-api-key`."""
    fallback = None
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip() or None
        if name == b"x-api-key":
            fallback = value.strip() or None
    return fallback


def _tenant(entry: KeyEntry) -> Tenant:
    return Tenant(
        name=entry.name,
        weight=entry.weight,
        experts=None if entry.experts is None else frozenset(entry.experts),
        requests_per_minute=entry.requests_per_minute,
        concurrent=entry.concurrent,
    )


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)
