"""Engines of the job's own as whoever answers: routed here, asked in blocks, grouped by expert.

Each worker holds some experts, checked by their fingerprints, as the routing table says; where much
is left for an expert the control plane gives it more workers. Knows nothing of how engines are
started.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

import aiohttp
import msgspec

from configs.manifest import BundleManifest
from router.conversation import Message
from router.errors import RouterError
from router.types import Route
from server.batch.errors import BatchError, LaneLostError, LineError
from server.batch.requests import ROUTE_PATH
from server.batch.types import Answer, Decision, Line, Seat, Task
from server.engine_host import LINES_PATH
from server.table import ROUTED_MODEL, RoutingTable

logger = logging.getLogger(__name__)

BLOCK = 128
"""Lines that one seat has in an engine at once."""
SEATS = 3
"""Of a worker: while the block of one is nearly over, the others keep the engine full."""
DEMAND_S = 5.0
"""Between two words to the control plane about what is left."""
REFUSED_S = 20.0
"""That an expert is refused and held by nobody before its lines are given up."""
SILENCE_S = 1800.0
"""Longest that an engine may be silent over a block."""
READ_BYTES = 1 << 20
MODEL_GONE = 404

_JSON = msgspec.json.Encoder()


class ConversationRouter(Protocol):
    """What is needed of a router."""

    def route_conversations(
        self, conversations: Sequence[Sequence[Message]], *, sure_only: bool = True
    ) -> list[Route]:
        """Where each conversation goes."""
        ...


class _Reply(msgspec.Struct):
    """One line of an engine's answer to a block."""

    id: int
    status: int
    body: msgspec.Raw


_REPLY = msgspec.json.Decoder(_Reply)


class OwnBackend:
    """Workers by their routing table; an async context manager."""

    def __init__(
        self,
        manifest: BundleManifest,
        router: ConversationRouter,
        *,
        table: Callable[[], RoutingTable],
        demand: Callable[[Mapping[str, float]], None],
        engine_key: str,
        sure_only: bool = True,
        block: int = BLOCK,
    ) -> None:
        """Describe it; nothing is asked yet.

        Args:
            manifest: of the bundle that the workers hold.
            router: the bundle's.
            table: the newest routing table.
            demand: tells the control plane what is left, by expert id.
            engine_key: what engines ask for.
            sure_only: whether texts that the router's student is not sure of are embedded.
            block: lines that one seat has in an engine at once.
        """
        self._router = router
        self._table_now = table
        self._demand = demand
        self._sure_only = sure_only
        self._block = block
        self._headers = {"authorization": f"Bearer {engine_key}"}
        self._base = manifest.base.name
        self._served = {entry.id: f"{entry.id}@{entry.version}" for entry in manifest.served}
        self._named = {name: name for name in self._served.values()} | self._served
        self._named[self._base] = self._base
        self._table: RoutingTable | None = None
        self._urls: dict[str, str] = {}
        self._holds: dict[str, frozenset[str]] = {}
        self._refused_since: dict[str, float] = {}
        self._told = -DEMAND_S
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_S),
            read_bufsize=READ_BYTES,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._http, "it has been entered"
        await self._http.close()

    @property
    def seats(self) -> Sequence[Seat]:
        """Some for each worker that is ready."""
        return [Seat(worker, worker, self._block) for worker in self._urls for _ in range(SEATS)]

    def holds(self, lane: str) -> frozenset[str] | None:
        """Served names that a worker has verified, and the base."""
        return self._holds.get(lane, frozenset())

    async def decide(self, tasks: Sequence[Task]) -> Sequence[Decision | LineError]:
        """By the bundle's router, in a thread; by name where a line names its model."""
        routed = [task for task in tasks if task.model == ROUTED_MODEL]
        try:
            routes = await asyncio.to_thread(
                self._router.route_conversations,
                [task.messages for task in routed],
                sure_only=self._sure_only,
            )
        except RouterError as error:
            raise BatchError(f"the input cannot be routed: {error}") from None
        rest = iter(routes)
        return [
            self._routed(task, next(rest)) if task.model == ROUTED_MODEL else self._asked(task)
            for task in tasks
        ]

    async def ask(self, lane: str, lines: Sequence[Line]) -> AsyncIterator[Answer]:
        """One call for the block; answers come in the order in which they are done."""
        assert self._http, "it has been entered"
        url = self._urls.get(lane)
        if url is None:
            raise LaneLostError("the worker is not ready any more", reached=False)
        body = b"\n".join(map(_request, lines))
        left = {line.number: line for line in lines}
        rest = b""
        try:
            async with self._http.post(url + LINES_PATH, data=body, headers=self._headers) as reply:
                if reply.status != 200:
                    raise LaneLostError(f"status {reply.status} to a block of lines")
                async for chunk in reply.content.iter_any():
                    *whole, rest = (rest + chunk).split(b"\n")
                    for raw in whole:
                        if raw and (line := left.pop((found := _REPLY.decode(raw)).id, None)):
                            yield self._answer(line, found)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise LaneLostError(str(error), reached=False) from None
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise LaneLostError(str(error) or type(error).__name__) from None
        if left:
            raise LaneLostError(f"it ended its answer with {len(left)} lines missing")

    async def refresh(self, remaining: Mapping[str, int]) -> Mapping[str, str]:
        """Follow the table, tell what is left, find experts that nobody will ever hold.

        Raises:
            BatchError: every worker has given up.
        """
        table = self._table_now()
        if table is not self._table:
            self._table = table
            ready = [worker for worker in table.workers if worker.state == "ready"]
            self._urls = {worker.id: worker.url for worker in ready if worker.url}
            self._holds = {w.id: frozenset([*w.experts, self._base]) for w in ready}
        if all(worker.state == "failed" for worker in table.workers) and table.workers:
            worker = table.workers[0]
            raise BatchError(
                f"no engine starts; {worker.id}: {worker.detail}. Mend that and give the same "
                "command again: what is finished stands"
            )
        now = asyncio.get_running_loop().time()
        if remaining and now - self._told >= DEMAND_S:
            self._told = now
            await asyncio.to_thread(self._demand, self._rates(remaining, len(table.workers)))
        return self._hopeless(table, remaining, now)

    def _rates(self, remaining: Mapping[str, int], workers: int) -> dict[str, float]:
        """What is left as the control plane measures demand: engines that could be busy with it."""
        of = {served: expert for expert, served in self._served.items()}
        total = sum(remaining.values())
        return {of[t]: workers * n / total for t, n in remaining.items() if t in of}

    def _hopeless(
        self, table: RoutingTable, remaining: Mapping[str, int], now: float
    ) -> dict[str, str]:
        held = frozenset[str]().union(*self._holds.values())
        refused = {name: why for worker in table.workers for name, why in worker.refused.items()}
        lost = {
            name: why for name, why in refused.items() if name in remaining and name not in held
        }
        self._refused_since = {name: self._refused_since.get(name, now) for name in lost}
        return {n: why for n, why in lost.items() if now - self._refused_since[n] >= REFUSED_S}

    def _routed(self, task: Task, route: Route) -> Decision:
        target = self._served.get(route.expert or "", self._base)
        if task.path != ROUTE_PATH:
            return Decision(target, route.score)
        document = {
            "object": "list",
            "data": [
                {
                    "expert": route.expert if route.expert in self._served else None,
                    "model": target,
                    "cluster": route.cluster,
                    "score": route.score,
                    "margin": route.margin,
                    "abstained": route.abstained,
                    "by": route.by,
                    "candidates": [
                        {"expert": c.expert, "score": c.score, "served": c.expert in self._served}
                        for c in route.top
                    ],
                }
            ],
        }
        return Decision(target, route.score, _JSON.encode(document))

    def _asked(self, task: Task) -> Decision | LineError:
        target = self._named.get(task.model)
        if target is None:
            return LineError(
                "model_not_found",
                f"there is no model '{task.model[:100]}'; give '{ROUTED_MODEL}', the base "
                f"'{self._base}', or an expert's id such as "
                f"'{next(iter(self._served), 'expert-0000')}'",
            )
        return Decision(target)

    def _answer(self, line: Line, found: _Reply) -> Answer:
        expert = "base" if line.target == self._base else None
        # an expert that was moved away meanwhile is asked for where it is now
        again = found.status == MODEL_GONE or found.status in (429, 503)
        return Answer(line.number, found.status, bytes(found.body), expert, again=again)


def _request(line: Line) -> bytes:
    model = _JSON.encode(line.target)
    comma = b"," if line.body != b"{}" else b""
    return b'{"id":%d,"path":%s,"body":{"model":%s%s%s}' % (
        line.number,
        _JSON.encode(line.path),
        model,
        comma,
        line.body[1:],
    )
