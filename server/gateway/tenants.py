"""Who asks: API keys, what each may do, and how much.

Knows headers and numbers, no request's body and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """The holder of one API key."""

    name: str = ""
    """As the keys' file says; empty: nobody in particular, where no keys are asked for."""
    weight: float = 1.0
    """Share of a busy worker that it gets, relative to the others'."""
    experts: frozenset[str] | None = None
    """Ids of the experts (and `base`) that it may ask; none: all."""

    def may_ask(self, expert: str) -> bool:
        """Whether it may have answers of this expert, or of `base`."""
        return self.experts is None or expert in self.experts


ANYBODY = Tenant()


class Keyring:
    """The keys that are known. Without any, everybody is `ANYBODY`."""

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Tenant:
        """Whose request it is, by its `Authorization: Bearer` or `x-api-key`.

        Raises:
            UnauthorizedError: no key, or one that is not known.
        """
        return ANYBODY

    def admit(self, tenant: Tenant) -> AbstractContextManager[None]:
        """Count one request of the tenant, from now until the context ends.

        Raises:
            RateLimitedError: it has too many running, or has asked too often.
        """
        return nullcontext()
