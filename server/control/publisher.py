"""The change from one served bundle to the next, without a request noticing.

    loading ──► canary ──► switching ──► draining ──► done
       └──► refused, aborted ◄──┘

Workers load and verify the new experts beside the old ones, gateways its router; a share of the
conversations may try it; one table makes it the served bundle; the old one goes when its last
request has ended. Until the switch the old bundle is the served one, whatever happens.

Knows nothing of Ray, nor of how its callers reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from configs.errors import IntrovertError
from configs.schema import RunConfig
from expert_trainer.bundle import Bundle
from expert_trainer.remote import redacted
from server.control.change import LATE, OVER, Change, holders, progress
from server.control.errors import BadChangeError, ChangeRunningError, NoChangeError
from server.control.place import place_beside
from server.control.reports import Gather, Report
from server.errors import ServerError
from server.orders import Deployment, Orders
from server.table import RoutingTable

logger = logging.getLogger(__name__)

REPORT_POLL_S = 0.25
GATEWAYS_S = 120.0
"""Longest that gateways may take to load a router or to read a table."""
TIDY_S = 60.0
"""Longest that workers are watched unloading what is not served any more."""


class Plane(Protocol):
    """The control plane as a change needs it."""

    @property
    def orders(self) -> Orders:
        """What is served now."""

    @property
    def table(self) -> RoutingTable:
        """The newest table."""

    async def order(self, orders: Orders) -> None:
        """Have something else served."""

    async def until(
        self, condition: Callable[[RoutingTable], bool], timeout_s: float | None
    ) -> RoutingTable:
        """Wait for a table; `TimeoutError` if there was none in time."""
        ...

    def open(self, place: str) -> Bundle:
        """The bundle at a place."""
        ...

    def describe(self, bundle: Bundle, place: str) -> Deployment:
        """A bundle as workers are told of it."""
        ...

    def remember(self, place: str, bundle: Bundle) -> None:
        """Have the next control process serve that bundle."""

    def remember_change(self, change: Change) -> None:
        """Have the next control process know of the change."""


class _RefusedError(ServerError):
    """The bundle cannot be served; the old one stays."""


class Publisher:
    """One change at a time."""

    def __init__(
        self, plane: Plane, config: RunConfig, gather: Gather, last: Change | None = None
    ) -> None:
        """Look after changes.

        Args:
            plane: what serves.
            config: the run.
            gather: asks the gateway processes.
            last: the change that the control process before this one had at its end.
        """
        self._plane = plane
        self._config = config
        self._gather = gather
        self._change = None if last is None else _resumed(last, plane.orders.served.bundle)
        self._began = 0.0
        self._promoted = asyncio.Event()
        self._taking_back = False
        self._task: asyncio.Task[None] | None = None

    @property
    def document(self) -> dict[str, Any]:
        """What is served, and the change under way or the last one."""
        served = self._plane.orders.served
        place = redacted(served.place or self._config.bundle.path)
        change = self._change.model_dump() if self._change else None
        return {"current": {"bundle": served.bundle, "place": place}, "change": change}

    def begin(self, path: str, canary: float | None = None) -> Change:
        """Begin to publish the bundle at a place.

        Args:
            path: an absolute path or a URL.
            canary: share of the conversations that try it until it is promoted; none: it is
                served as soon as it is verified.

        Raises:
            ChangeRunningError: one is under way.
            ForbiddenPlaceError: the place is not beside the configured bundle's.
            BadChangeError: no share between 0 and 1.
        """
        if self._change is not None and self._change.state not in OVER:
            raise ChangeRunningError(
                f"{self._change.place} is being published ({self._change.state}); promote or "
                "abort it, or wait for its end"
            )
        if canary is not None and not 0 < canary < 1:
            raise BadChangeError(f"a canary's share lies between 0 and 1, unlike {canary:g}")
        place = place_beside(self._config.bundle.path, path)
        self._began = time.monotonic()
        self._promoted = asyncio.Event()
        self._taking_back = False
        change = self._change = Change(place=redacted(place), detail="reading its manifest")
        self._task = asyncio.create_task(self._publish(place, canary))
        return change

    def promote(self) -> Change:
        """Have the canary become the served bundle.

        Raises:
            NoChangeError: there is no canary.
        """
        if self._change is None or self._change.state != "canary":
            raise NoChangeError("there is no canary to promote; publish with --canary first")
        self._promoted.set()
        return self._change

    def abort(self) -> Change:
        """Take the change back.

        Raises:
            NoChangeError: none is under way, or it is too late.
        """
        if self._change is None or self._change.state in OVER:
            raise NoChangeError("nothing is being published")
        if self._change.state in LATE or self._promoted.is_set():
            raise NoChangeError(
                f"it is too late to abort: {self._change.place} is served already; publish the "
                "bundle before it again"
            )
        assert self._task, "a change is under way"
        if not self._taking_back:
            self._task.cancel()
        return self._change

    async def end(self) -> None:
        """Leave a change where it is; the next control process says what became of it."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _publish(self, place: str, canary: float | None) -> None:
        before = self._plane.orders.served
        try:
            bundle = await asyncio.to_thread(self._plane.open, place)
            self._note(bundle=bundle.manifest.version)
            if bundle.manifest.version == before.bundle:
                self._note(state="done", detail="it was served already")
                return
            following = await asyncio.to_thread(self._plane.describe, bundle, place)
            await self._stage(following)
            await self._await_routers(following.bundle)
            if canary is not None:
                await self._try(following, canary)
            self._note(state="switching", share=0.0, detail="")
        except asyncio.CancelledError:
            if self._task is not None:  # else the control process ends
                await self._take_back(before, "aborted", "as it was asked for")
            return
        except IntrovertError as error:
            await self._take_back(before, "refused", str(error))
            return
        except Exception as error:
            logger.exception("a change failed")
            reason = f"an unforeseen {type(error).__name__}: {error}; the log has the traceback"
            await self._take_back(before, "aborted", reason)
            return
        try:
            self._plane.remember(place, bundle)
            await self._switch(following, before)
        except Exception as error:
            # it is served by now: whatever failed, the next change must not wait for this one
            logger.exception("a change did not end in order")
            await self._plane.order(Orders(following))
            self._note(state="done", detail=f"an unforeseen {type(error).__name__}: {error}")

    async def _stage(self, following: Deployment) -> None:
        """Have the workers load and verify it.

        Raises:
            _RefusedError: a worker refuses an expert, or they are not done in time.
        """
        self._note(total=len(following.experts), detail="workers load and verify its experts")
        await self._plane.order(Orders(self._plane.orders.served, following))
        limit = self._config.serving.startup_timeout_s
        seen = -1
        try:
            async with asyncio.timeout(limit):
                while True:
                    table = await self._plane.until(_newer(seen), None)
                    seen = table.version
                    reached = progress(table, following.bundle)
                    if reached is None:
                        continue
                    self._note(verified=reached.verified, refused=dict(reached.refused))
                    if reached.settled:
                        break
        except TimeoutError:
            raise _RefusedError(
                f"the workers have not verified all experts within {limit:g} s; raise "
                "serving.startup_timeout_s, or see their state with `introvert status`"
            ) from None
        if reached.refused:
            raise _RefusedError(f"{len(reached.refused)} of {reached.total} experts are refused")

    async def _await_routers(self, bundle: str) -> None:
        """Have every gateway process load its router.

        Raises:
            _RefusedError: one cannot, or they are not done in time.
        """

        def ready(reports: Sequence[Report]) -> bool:
            states = [report.routers.get(bundle, "loading") for report in reports]
            for state in states:
                if state.startswith(("failed", "mismatched")):
                    raise _RefusedError(f"a gateway cannot use its router: {state}")
            return all(state == "ready" for state in states)

        self._note(detail="gateways load its router")
        if not await self._gateways(ready, GATEWAYS_S):
            raise _RefusedError(f"the gateways have not loaded its router within {GATEWAYS_S:g} s")

    async def _try(self, following: Deployment, share: float) -> None:
        """Have it answer a share of the conversations until it is promoted."""
        await self._plane.order(Orders(self._plane.orders.served, following, share))
        await self._plane.until(lambda table: bool(table.canary and table.canary.share), None)
        self._note(state="canary", share=share, detail="until it is promoted or aborted")
        await self._promoted.wait()

    async def _switch(self, following: Deployment, before: Deployment) -> None:
        """Serve it; let the old one go when nobody is on it any more."""
        await self._plane.order(Orders(following, retiring=before))
        await self._plane.until(lambda table: table.bundle == following.bundle, None)
        self._note(state="draining", detail="the last requests on the old bundle end")
        await self._drain(before.bundle)
        await self._plane.order(Orders(following))
        kept = await self._tidied(_names(before) - _names(following))
        self._note(state="done", detail=kept)

    async def _drain(self, bundle: str) -> None:
        """Wait until no gateway begins or has a request on a bundle that was taken away."""
        version = self._plane.table.version

        def switched(reports: Sequence[Report]) -> bool:
            return all(report.table_version >= version for report in reports)

        def drained(reports: Sequence[Report]) -> bool:
            return not any(report.in_flight_bundles.get(bundle) for report in reports)

        await self._gateways(switched, GATEWAYS_S)
        await self._gateways(drained, self._config.serving.drain_timeout_s)

    async def _take_back(self, before: Deployment, state: Any, reason: str) -> None:
        """Have nothing but the old bundle served and loaded."""
        self._taking_back = True
        following = self._plane.orders.following
        if following is not None:
            if self._plane.orders.share:
                await self._plane.order(Orders(before, retiring=following))
                await self._plane.until(lambda table: table.canary is None, None)
                await self._drain(following.bundle)
            await self._plane.order(Orders(before))
            kept = await self._tidied(_names(following) - _names(before))
            reason = "; ".join(filter(None, (reason, kept)))
        self._note(state=state, share=0.0, detail=reason)

    async def _tidied(self, names: set[str]) -> str:
        """Wait until no worker holds any of these; which do, if that takes long."""
        with contextlib.suppress(TimeoutError):
            await self._plane.until(lambda table: not holders(table, names), TIDY_S)
            return ""
        return f"{', '.join(holders(self._plane.table, names))} still unload"

    async def _gateways(self, met: Callable[[Sequence[Report]], bool], limit_s: float) -> bool:
        """Ask the gateways until all of them answer and a condition is met; whether it was."""
        deadline = time.monotonic() + limit_s
        while True:
            reports = await self._gather()
            if len(reports) >= self._config.gateway.processes and met(reports):
                return True
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(REPORT_POLL_S)

    def _note(self, **news: Any) -> None:
        assert self._change, "a change is under way"
        before = self._change
        took = round(time.monotonic() - self._began, 3)
        self._change = self._change.model_copy(update={**news, "took_s": took})
        if self._change.state != before.state or self._change.bundle != before.bundle:
            logger.info("%s: %s %s", before.place, self._change.state, self._change.detail)
            self._plane.remember_change(self._change)


def _resumed(last: Change, served: str) -> Change:
    """A change that another control process had begun, as it stands now."""
    if last.state in OVER:
        return last
    done = last.bundle == served
    return last.model_copy(
        update={
            "state": "done" if done else "aborted",
            "share": 0.0,
            "detail": "the control process died during it"
            + ("" if done else "; the bundle before it is served; publish it again"),
        }
    )


def _names(deployment: Deployment) -> set[str]:
    return {expert.name for expert in deployment.experts}


def _newer(version: int) -> Callable[[RoutingTable], bool]:
    return lambda table: table.version > version
