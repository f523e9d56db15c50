"""Routing by meaning inside the gateway: the routers of the bundles that the table names.

The ids of experts mean something within one bundle only, so a router is used for the bundle that
it is part of and for no other. Texts that the router's student is sure of are routed on the event
loop, those of one turn together; the others are taken in batches in a thread of their own, by a
second student and, at the last, by the embedder.
This module knows nothing of workers, of HTTP, or of how a router decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from configs.errors import IntrovertError
from configs.schema import RunConfig
from router.conversation import ROUTED_CHARACTERS, Message, request_messages
from router.conversation import Endpoint as RequestKind
from router.errors import UnroutableError
from router.types import Route
from server.gateway.answers import RouterState, RouterStatus
from server.gateway.batching import Batcher, QueueFullError, TurnBatcher
from server.gateway.errors import RouterNotReadyError, UnavailableError, UnroutableTextError

logger = logging.getLogger(__name__)

BATCH_REQUESTS = 32
"""Requests embedded together at the most: a larger batch costs latency and gains nothing."""
WAITING_REQUESTS = 512
"""Requests that may wait for the embedder: about a second's work of one core."""

QUICK_REQUESTS = 16
"""Conversations that the student takes at a time, half a millisecond's work; of those of one
request others have their turn in between."""

RETRY_FIRST_S, RETRY_MOST_S = 10.0, 300.0
"""Between two attempts to load a router, doubled after each: what lies behind a URL comes back."""


class TextRouter(Protocol):
    """What the gateway needs of a router."""

    @property
    def threshold(self) -> float:
        """Score below which the router abstains."""
        ...

    def quick_routes(self, conversations: Sequence[Sequence[Message]]) -> Sequence[Route | None]:
        """Where each conversation goes, if that can be told in a fraction of a millisecond."""
        ...

    def route_conversations(self, conversations: Sequence[Sequence[Message]]) -> list[Route]:
        """Where each conversation goes, in the time that it takes."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedRouter:
    """A router and the bundle it is part of."""

    router: TextRouter
    bundle: str
    """Version of the bundle."""


RouterSource = Callable[[str], LoadedRouter]
"""Loads the router of the bundle at a place (directory or URL; empty: the configured one); called
off the event loop."""


def router_from_bundle(config: RunConfig, place: str = "") -> LoadedRouter:
    """The router of a published bundle, with one thread.

    GPUs are the engines': the embedder takes one only where `router.device` asks for it by name.

    Args:
        config: the run; where copies of what lies behind a URL are kept.
        place: directory or URL of the bundle; empty: the configured one.

    Raises:
        IntrovertError: the bundle or its router cannot be read.
    """
    from expert_trainer.bundle import open_published
    from router.model import Router

    at = config.bundle
    if place and place != at.path:
        at = at.model_copy(
            update={"path": place, "work_dir": at.work, "scratch_dir": str(at.scratch)}
        )
    # The workers verify the experts that they load; the router verifies its own files. Of a bundle
    # behind a URL the router alone is copied.
    bundle = open_published(at, verify=False)
    device = "cuda" if config.router.device == "cuda" else "cpu"
    router = Router.load(bundle.router_dir, device=device, threads=1, runtime=config.router.runtime)
    return LoadedRouter(router=router, bundle=bundle.manifest.version)


class BundleRouting:
    """The router of one bundle as the event loop sees it, loaded in the background."""

    def __init__(self, bundle: str, place: str) -> None:
        self.bundle = bundle
        self.place = place
        self.router: TextRouter | None = None
        self._guessing: TurnBatcher[Sequence[Message], Route | None] | None = None
        self._embedding: Batcher[Sequence[Message], Route] | None = None
        self._state: RouterState = "loading"
        self._detail = "the router is being loaded"
        self._found: str | None = None
        self.tried = asyncio.Event()
        """Set once it was loaded, could not be for the first time, or is not wanted any more."""

    @property
    def status(self) -> RouterStatus:
        """State of the router; `bundle` is the one that it was found to be of."""
        return RouterStatus(state=self._state, bundle=self._found, detail=self._detail)

    async def load(self, source: RouterSource, loading: Executor, embedding: Executor) -> None:
        """Load the router, again and again until that works; failures are logged and shown.

        One of another bundle is not asked for again: what was published since stays published.

        Args:
            source: of routers.
            loading: where it is called.
            embedding: where the router's embedder works.
        """
        loop = asyncio.get_running_loop()
        wait = RETRY_FIRST_S
        while True:
            try:
                loaded = await loop.run_in_executor(loading, source, self.place)
            except IntrovertError as error:
                logger.error("the router cannot be loaded: %s", error)
                self._state, self._detail = "failed", f"the router cannot be loaded: {error}"
            except Exception:
                logger.exception("the router cannot be loaded")
                self._state = "failed"
                self._detail = "the router cannot be loaded; the gateway's log has the traceback"
            else:
                self._take(loaded, embedding)
                return
            finally:
                self.tried.set()
            await asyncio.sleep(wait)
            wait = min(2 * wait, RETRY_MOST_S)

    def _take(self, loaded: LoadedRouter, embedding: Executor) -> None:
        """Use a router, if it is the right one."""
        self._found = loaded.bundle
        if loaded.bundle != self.bundle:
            self._state = "mismatched"
            self._detail = (
                f"the router is of bundle {loaded.bundle}, published since, while the workers "
                f"serve bundle {self.bundle}; run `introvert publish`, or restart `introvert serve`"
            )
            logger.error("%s", self._detail)
            return
        self.router = loaded.router
        self._guessing = TurnBatcher(loaded.router.quick_routes, QUICK_REQUESTS)
        self._embedding = Batcher(
            loaded.router.route_conversations, embedding, BATCH_REQUESTS, WAITING_REQUESTS
        )
        self._state, self._detail = "ready", ""
        logger.info("routing by the router of bundle %s", loaded.bundle)

    async def route(self, conversations: Sequence[Sequence[Message]]) -> Sequence[Route]:
        """Where each conversation goes; the router is ready.

        Raises:
            QueueFullError: too many wait for the embedder.
        """
        guessing, embedding = self._guessing, self._embedding
        assert guessing is not None
        assert embedding is not None
        routes = await guessing(conversations)
        missing = [place for place, route in enumerate(routes) if route is None]
        if missing:
            embedded = await embedding([conversations[place] for place in missing])
            for place, route in zip(missing, embedded, strict=True):
                routes[place] = route
        return [route for route in routes if route is not None]


class Routing:
    """The routers of the bundles that are served, or are about to be."""

    def __init__(
        self, source: RouterSource, *, retry_after_s: int, patience_s: float = 0.0
    ) -> None:
        """No router yet.

        Args:
            source: of routers.
            retry_after_s: when to come back, as those are told that cannot be routed.
            patience_s: how long texts wait for a router that is being loaded.
        """
        self._source = source
        self._retry_after_s = retry_after_s
        self._patience_s = patience_s
        self._patient = 0
        self._embedding = ThreadPoolExecutor(1, thread_name_prefix="router")
        # A router on its way must not hold up those that are used.
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="router-loading")
        self._bundles: dict[str, BundleRouting] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._served: str | None = None

    def serve(self, bundles: Mapping[str, str]) -> None:
        """Route for these bundles from now on: load what is new, drop what is not among them.

        A request that is being routed keeps the router that it began with. To be called on the
        event loop.

        Args:
            bundles: version to place (directory or URL; empty: the configured one); the first is
                the served one, which `status`, `threshold` and `route` mean where none is named.
        """
        self._served = next(iter(bundles), None)
        for version in self._bundles.keys() - bundles.keys():
            del self._bundles[version]
            self._tasks.pop(version).cancel()
        for version, place in bundles.items():
            known = self._bundles.get(version)
            if known is not None and (known.place == place or self.ready(version)):
                continue
            if known is not None:
                self._tasks.pop(version).cancel()
            entry = self._bundles[version] = BundleRouting(version, place)
            self._tasks[version] = asyncio.create_task(
                entry.load(self._source, self._loading, self._embedding)
            )

    def close(self) -> None:
        """Load nothing more; let the threads end once they have finished what they do."""
        for task in self._tasks.values():
            task.cancel()
        self._loading.shutdown(wait=False, cancel_futures=True)
        self._embedding.shutdown(wait=False, cancel_futures=True)

    def ready(self, bundle: str) -> bool:
        """Whether texts can be routed for this bundle (its version)."""
        entry = self._bundles.get(bundle)
        return entry is not None and entry.router is not None

    def states(self) -> dict[str, RouterStatus]:
        """State of each bundle's router, by the bundle's version."""
        return {version: entry.status for version, entry in self._bundles.items()}

    @property
    def status(self) -> RouterStatus:
        """State of the served bundle's router."""
        return self._status(self._served)

    @property
    def threshold(self) -> float | None:
        """Score below which the served bundle's router abstains; none before it is loaded."""
        return self.threshold_of(self._served)

    def threshold_of(self, bundle: str | None) -> float | None:
        """Score below which a bundle's router abstains; none where it is not loaded."""
        entry = self._bundles.get(bundle or "")
        return entry.router.threshold if entry and entry.router else None

    async def route(
        self,
        kind: RequestKind,
        requests: Sequence[Mapping[str, Any]],
        bundle: str | None = None,
    ) -> Sequence[Route]:
        """Where each request goes: by the student, or with whatever else waits for the embedder.

        Args:
            kind: shape of the requests.
            requests: of each, the fields that may be routed on.
            bundle: version of the bundle among whose experts to choose; none: the served one.

        Raises:
            RouterNotReadyError: the bundle's router is not loaded, or is another bundle's.
            UnavailableError: too many requests wait to be routed.
            UnroutableTextError: nothing in a request can be routed on.
        """
        # Before the batch, which one bad request would spoil for all in it.
        conversations = [_messages(kind, fields) for fields in requests]
        bundle = bundle or self._served
        if bundle is None or not (self.ready(bundle) or await self._arrives(bundle)):
            raise RouterNotReadyError(
                f"'introvert' cannot be used now: {self._status(bundle).detail}. Try again in "
                f"{self._retry_after_s} s, or name an expert or the base.",
                retry_after_s=self._retry_after_s,
            )
        try:
            return await self._bundles[bundle].route(conversations)
        except QueueFullError:
            raise UnavailableError(
                f"{WAITING_REQUESTS} requests wait to be routed by meaning, which is all that may. "
                f"Try again in {self._retry_after_s} s, or name an expert or the base.",
                retry_after_s=self._retry_after_s,
            ) from None

    async def _arrives(self, bundle: str) -> bool:
        """Wait for a router that is being loaded for the first time; whether it is ready then."""
        entry = self._bundles.get(bundle)
        if entry is None or entry.tried.is_set() or self._patient >= WAITING_REQUESTS:
            return False
        self._patient += 1
        try:
            async with asyncio.timeout(self._patience_s):
                await entry.tried.wait()
        except TimeoutError:
            return False
        finally:
            self._patient -= 1
        return self.ready(bundle)

    def _status(self, bundle: str | None) -> RouterStatus:
        entry = self._bundles.get(bundle or "")
        if entry is not None:
            return entry.status
        return RouterStatus(state="loading", bundle=None, detail="the router is being loaded")


def _messages(kind: RequestKind, fields: Mapping[str, Any]) -> list[Message]:
    try:
        messages = request_messages(kind, fields)
    except UnroutableError as error:
        raise UnroutableTextError(f"{error}.", param=error.field) from None
    return [Message(message.role, message.text[:ROUTED_CHARACTERS]) for message in messages]
