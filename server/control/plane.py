"""The control plane of one run: controller and workers on Ray, and the table that they make.

Knows nothing of HTTP, of gateways' processes, or of how a bundle becomes the served one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from configs.schema import RunConfig
from expert_trainer.base import resolve_base
from expert_trainer.bundle import COPIES_DIR, Bundle, open_bundle
from server.control.bundles import check_base, describe
from server.control.change import Change
from server.control.staff import Staff, kill, list_nodes
from server.control.state import ControlState, read_state, write_state
from server.controller import create_controller
from server.errors import NotBegunError, ServerError
from server.orders import Deployment, Orders, Rules
from server.placement import Policy
from server.table import ENGINE_KEY_FILE, TABLE_FILE, RoutingTable, read_table, write_table
from server.worker import EngineSettings

logger = logging.getLogger(__name__)

LONG_POLL_S = 1.0
ANSWER_MARGIN_S = 10.0
FIRST_TABLE_S = 120.0
NODES_POLL_S = 2.0
SETTLE_S = 5.0
"""Seconds that a new home holds an expert before the old one lets it go."""


class ControlPlane:
    """Controller and workers, from `begin` to `end`, inside a Ray session."""

    def __init__(self, config: RunConfig, run_dir: Path, *, offline: bool = False) -> None:
        """Describe it; nothing is started or looked for yet.

        Args:
            config: the run.
            run_dir: where the table is written, and what the next control process needs.
            offline: whether the engines are a batch's.
        """
        self.config = config
        self.base = resolve_base(config.base)
        self._run_dir = run_dir
        self._table_file = run_dir / TABLE_FILE
        self._rules = rules(config)
        before = read_state(run_dir)
        self.is_first = before is None
        """Whether there was no control process before this one."""
        self._state = before or ControlState(run=f"{secrets.token_hex(6)}:")
        self._table: RoutingTable | None = None
        self._news = asyncio.Condition()
        self._directing = asyncio.Lock()
        self._controller: Any = None
        self._orders: Orders | None = None
        self._told: frozenset[str] = frozenset()
        self._listed: frozenset[str] = frozenset()  # actors that the table is of
        self._staff = Staff(
            self._state.run,
            config.serving,
            EngineSettings(
                base=self.base,
                serving=config.serving,
                log_dir=(config.bundle.scratch / "logs").resolve(),
                api_key=(run_dir / ENGINE_KEY_FILE).read_text(encoding="utf-8").strip(),
                offline=offline,
            ),
        )

    @property
    def table(self) -> RoutingTable:
        """The newest routing table."""
        assert self._table, "it has begun"
        return self._table

    @property
    def orders(self) -> Orders:
        """What the controller has been told to serve."""
        assert self._orders, "it has begun"
        return self._orders

    async def begin(self) -> None:
        """Bring controller and workers up, or find them again, and write the first table.

        Raises:
            BundleError, StorageError: the bundle cannot be read.
            ServingConfigError: the config does not fit the bundle or the cluster.
            ServerError: Ray does not start the controller.
        """
        bundle = await asyncio.to_thread(self._bundle)
        self._orders = Orders(await asyncio.to_thread(self.describe, bundle, self._state.place))
        self._state = self._state.model_copy(update={"manifest": bundle.manifest})
        try:
            self._table = read_table(self._table_file)
        except FileNotFoundError:
            self._table = None
        self._staff.adopt(self._state.workers)
        self._staff.fill(await asyncio.to_thread(list_nodes))
        self._save()
        self._controller = create_controller(self._state.run)
        try:
            async with asyncio.timeout(FIRST_TABLE_S):
                await self._direct()
                version = self._table.version if self._table else 0
                table = await self._controller.table.remote(min(version, 0), FIRST_TABLE_S)
        except TimeoutError:
            raise ServerError(
                f"Ray did not start the controller within {FIRST_TABLE_S:g} s; "
                "see whether the cluster has free memory"
            ) from None
        await self._note(table)

    async def keep(self) -> None:
        """For ever: write every new table, look after the nodes."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_table())
            tasks.create_task(self._keep_staff())

    async def end(self) -> None:
        """End the workers and the controller; return when no engine is left."""
        await self._staff.end()
        if self._controller is not None:
            kill(self._controller)

    async def order(self, orders: Orders) -> None:
        """Have the controller serve something else; a table that says so follows.

        Should the controller die at this very moment, it is told when Ray has started it again.
        """
        self._orders = orders
        try:
            await self._direct()
        except RayError as error:
            self._note_silence(error)

    def remember(self, place: str, bundle: Bundle) -> None:
        """Have a control process after this one serve that bundle."""
        self._state = self._state.model_copy(update={"place": place, "manifest": bundle.manifest})
        self._save()

    def remember_change(self, change: Change) -> None:
        """Have a control process after this one know of a change."""
        self._state = self._state.model_copy(update={"change": change})
        self._save()

    @property
    def last_change(self) -> Change | None:
        """What a control process before this one knew of a change."""
        return self._state.change

    async def until(
        self, condition: Callable[[RoutingTable], bool], timeout_s: float | None
    ) -> RoutingTable:
        """Wait for a table.

        Raises:
            TimeoutError: there was none in time.
        """
        async with asyncio.timeout(timeout_s), self._news:
            await self._news.wait_for(lambda: condition(self.table))
            return self.table

    async def demand(self, rates: Mapping[str, float]) -> None:
        """Tell the controller what experts are asked for: engine seconds per second by id."""
        try:
            await self._controller.demand.remote(dict(rates))
        except RayError as error:
            self._note_silence(error)

    def describe(self, bundle: Bundle, place: str) -> Deployment:
        """A bundle as the workers are told of it.

        Raises:
            BaseModelError, ServingConfigError, DamagedBundleError: it cannot be served here.
        """
        check_base(bundle, self.base)
        return describe(bundle, self.config.serving, self.base, place=place)

    def open(self, place: str) -> Bundle:
        """A bundle by its place, its files not looked at yet.

        Raises:
            NotPublishedError, DamagedBundleError, StorageError: it cannot be read.
        """
        copies = self.config.bundle.scratch.absolute() / COPIES_DIR
        return open_bundle(place, verify=False, cache=copies)

    def _bundle(self) -> Bundle:
        """What was served last."""
        bundle = self.open(self._state.place or self.config.bundle.path)
        if self._state.manifest is None:
            return bundle
        return dataclasses.replace(bundle, manifest=self._state.manifest)

    def _save(self) -> None:
        self._state = self._state.model_copy(update={"workers": self._staff.hired})
        write_state(self._run_dir, self._state)

    async def _direct(self) -> None:
        async with self._directing:
            # without it one that Ray has started again would say that no worker is ready yet
            posts = {
                worker: dataclasses.replace(post, adopted=post.adopted or post.name in self._listed)
                for worker, post in self._staff.posts.items()
            }
            await self._controller.direct.remote(self.orders, posts, self._rules, self._table)
            self._told = frozenset(post.name for post in posts.values())

    async def _note(self, table: RoutingTable) -> None:
        write_table(self._table_file, table)
        self._listed = self._told
        async with self._news:
            self._table = table
            self._news.notify_all()

    async def _keep_table(self) -> None:
        while True:
            try:
                async with asyncio.timeout(LONG_POLL_S + ANSWER_MARGIN_S):
                    table = await self._controller.table.remote(self.table.version, LONG_POLL_S)
                if table is not None:
                    await self._note(table)
            except NotBegunError:
                await self.order(self.orders)
            except (RayError, OSError, TimeoutError) as error:  # gateways go on with the last one
                self._note_silence(error)
                await asyncio.sleep(LONG_POLL_S)

    async def _keep_staff(self) -> None:
        while True:
            await asyncio.sleep(NODES_POLL_S)
            try:
                if self._staff.fill(await asyncio.to_thread(list_nodes)):
                    self._save()
                    await self.order(self.orders)
            except (RayError, OSError, ServerError) as error:
                self._note_silence(error)

    def _note_silence(self, error: Exception) -> None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("no news from the controller: %s", reason)


def rules(config: RunConfig) -> Rules:
    """How the controller goes about it."""
    serving = config.serving
    return Rules(
        slots=None if serving.slots == "auto" else serving.slots,
        silence_s=serving.hang_timeout_s,
        move_after_s=serving.move_after_s,
        settle_s=SETTLE_S,
        drain_s=serving.drain_timeout_s,
        policy=Policy(max_replicas=serving.max_replicas, gain=serving.rebalance_gain),
    )
