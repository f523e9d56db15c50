"""Workers and bundles without a process or a file, for tests of the control plane."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from configs.manifest import Fingerprint
from server.engine import Adapter
from server.errors import WorkerLostError
from server.orders import Deployment, Rules, ServedExpert
from server.placement import Policy
from server.table import WorkerEntry, WorkerState
from server.worker import WorkerStatus


class FakeWorker:
    """Ready as soon as it has been told what to serve; refuses what `refuses` names."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.assigned: tuple[str, ...] | None = None
        self.told = 0
        self.asked = 0
        self.lost = False
        self.silent = False
        self.refuses: dict[str, str] = {}

    async def status(self) -> WorkerStatus:
        self.asked += 1
        if self.silent:
            await asyncio.sleep(3600)
        if self.lost:
            raise WorkerLostError("its process is gone")
        state: WorkerState = "starting" if self.assigned is None else "ready"
        assigned = self.assigned or ()
        refused = {name: self.refuses[name] for name in assigned if name in self.refuses}
        entry = WorkerEntry(
            id=self.name,
            state=state,
            url="http://127.0.0.1:20001",
            node="127.0.0.1",
            devices="cores:0",
            engine="vllm 1",
            pid=7,
            experts=[name for name in assigned if name not in refused],
            restarts=0,
            detail="",
            refused=refused,
        )
        return WorkerStatus(entry, self.assigned, 512 if self.assigned is not None else None)

    async def serve(self, adapters: Sequence[Adapter]) -> None:
        if self.lost:
            raise WorkerLostError("its process is gone")
        self.told += 1
        self.assigned = tuple(adapter.served_name for adapter in adapters)

    def restart(self) -> None:
        self.assigned = None


def expert(number: int, mass: float, version: str = "") -> ServedExpert:
    name, version = f"expert-{number:04d}", version or f"{number:012x}"
    adapter = Adapter(
        f"{name}@{version}", f"/bundle/{name}", 8, Fingerprint(token_ids=[1, 2], logprobs=[-1.0])
    )
    return ServedExpert(name, version, number, mass, adapter)


DEPLOYMENT = Deployment(
    bundle="0123456789ab",
    base_name="base",
    experts=tuple(expert(i, mass) for i, mass in enumerate([0.5, 0.3, 0.2])),
)
RULES = Rules(
    slots=None, silence_s=1.0, move_after_s=3600, settle_s=0.0, drain_s=0.2, policy=Policy()
)


def following(bundle: str, changed: Sequence[int] = (0, 1, 2)) -> Deployment:
    """A bundle in which these experts are others, and the rest stay."""
    experts = tuple(
        expert(number, old.mass, f"{bundle[:6]}{number:06x}") if number in changed else old
        for number, old in enumerate(DEPLOYMENT.experts)
    )
    return Deployment(bundle, "base", experts, f"/bundles/{bundle}")
