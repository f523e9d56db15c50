"""Routing by meaning inside the gateway: the router, in a thread of its own.

The ids of experts mean something within one bundle only, so a router is used for the bundle that
it is part of and for no other. This module knows nothing of workers, of HTTP, or of how the router
decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from configs.errors import IntrovertError
from configs.schema import RunConfig
from router.conversation import Endpoint as RequestKind
from router.conversation import Message, request_messages
from router.errors import UnroutableError
from router.types import Route
from server.gateway.answers import RouterState, RouterStatus
from server.gateway.batching import Batcher
from server.gateway.errors import RouterNotReadyError, UnroutableTextError

logger = logging.getLogger(__name__)

BATCH_REQUESTS = 32
"""Requests routed together at the most: a larger batch costs latency and gains nothing."""

ROUTED_CHARACTERS = 32_768
"""Of each message only the beginning is routed on. Embedders read less than that, yet would first
cut all of it into tokens: five seconds for 8 MB, in the one thread that everybody waits for."""


class TextRouter(Protocol):
    """What the gateway needs of a router."""

    @property
    def threshold(self) -> float:
        """Score below which the router abstains."""
        ...

    def route_conversations(self, conversations: Sequence[Sequence[Message]]) -> list[Route]:
        """Where each conversation goes."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedRouter:
    """A router and the bundle it is part of."""

    router: TextRouter
    bundle: str
    """Version of the bundle."""


RouterSource = Callable[[], LoadedRouter]
"""Loads the router; called once, off the event loop."""


def router_from_bundle(config: RunConfig) -> LoadedRouter:
    """The router of the published bundle, with one thread.

    GPUs are the engines': the embedder takes one only where `router.device` asks for it by name.

    Raises:
        IntrovertError: the bundle or its router cannot be read.
    """
    from expert_trainer.bundle import open_published
    from router.model import Router

    # The workers verify the experts that they load; the router verifies its own files. Of a bundle
    # behind a URL the router alone is copied.
    bundle = open_published(config.bundle, verify=False)
    device = "cuda" if config.router.device == "cuda" else "cpu"
    router = Router.load(bundle.router_dir, device=device, threads=1)
    return LoadedRouter(router=router, bundle=bundle.manifest.version)


class Routing:
    """The router as the event loop sees it."""

    def __init__(self, source: RouterSource, *, retry_after_s: int) -> None:
        self._source = source
        self._retry_after_s = retry_after_s
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="router")
        self._loaded: LoadedRouter | None = None
        self._served: str | None = None
        self._batcher: Batcher[Sequence[Message], Route] | None = None
        self._state: RouterState = "loading"
        self._detail = "the router is being loaded"

    async def load(self) -> None:
        """Load the router; a failure is logged and shown by `status`, for explicit models go on."""
        try:
            loaded = await asyncio.get_running_loop().run_in_executor(self._executor, self._source)
        except IntrovertError as error:
            logger.error("the router cannot be loaded: %s", error)
            self._state, self._detail = "failed", f"the router cannot be loaded: {error}"
            return
        except Exception:
            logger.exception("the router cannot be loaded")
            self._state = "failed"
            self._detail = "the router cannot be loaded; the gateway's log has the traceback"
            return
        self._loaded = loaded
        self._batcher = Batcher(loaded.router.route_conversations, self._executor, BATCH_REQUESTS)
        self._state, self._detail = "ready", ""
        logger.info("routing by the router of bundle %s", loaded.bundle)

    def serve(self, bundle: str) -> None:
        """From now on the experts are those of this bundle (its version)."""
        self._served = bundle

    def close(self) -> None:
        """Let the thread end once it has finished what it does."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def status(self) -> RouterStatus:
        """State of the router."""
        loaded, served = self._loaded, self._served
        if loaded is not None and served is not None and loaded.bundle != served:
            return RouterStatus(
                state="mismatched",
                bundle=loaded.bundle,
                detail=(
                    f"the router is of bundle {loaded.bundle}, published since, while the workers "
                    f"serve bundle {served}; restart `introvert serve`"
                ),
            )
        bundle = loaded.bundle if loaded else None
        return RouterStatus(state=self._state, bundle=bundle, detail=self._detail)

    @property
    def threshold(self) -> float | None:
        """Score below which the router abstains; none before it is loaded."""
        return self._loaded.router.threshold if self._loaded else None

    async def route(
        self, kind: RequestKind, requests: Sequence[Mapping[str, Any]]
    ) -> Sequence[Route]:
        """Where each request goes, computed together with whatever else waits to be routed.

        Args:
            kind: shape of the requests.
            requests: of each, the fields that may be routed on.

        Raises:
            RouterNotReadyError: the router is not loaded, or of another bundle than the experts.
            UnroutableTextError: nothing in a request can be routed on.
        """
        # Before the batch, which one bad request would spoil for all in it.
        conversations = [_messages(kind, fields) for fields in requests]
        batcher = self._ready()
        routes = await batcher(conversations)
        self._ready()  # another bundle may be served since
        return routes

    def _ready(self) -> Batcher[Sequence[Message], Route]:
        status = self.status
        if self._batcher is None or status.state != "ready":
            raise RouterNotReadyError(
                f"'introvert' cannot be used now: {status.detail}. Try again in "
                f"{self._retry_after_s} s, or name an expert or the base.",
                retry_after_s=self._retry_after_s,
            )
        return self._batcher


def _messages(kind: RequestKind, fields: Mapping[str, Any]) -> list[Message]:
    try:
        messages = request_messages(kind, fields)
    except UnroutableError as error:
        raise UnroutableTextError(f"{error}.", param=error.field) from None
    return [Message(message.role, message.text[:ROUTED_CHARACTERS]) for message in messages]
