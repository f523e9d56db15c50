"""Backends that answer by echo: who was asked can be read in the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence

from server.batch.errors import LaneLostError, LineError
from server.batch.types import Answer, Decision, Line, Seat, Task
from server.table import ROUTED_MODEL


class EchoBackend:
    """Experts by the first word of a text; answers with the target's name."""

    def __init__(
        self,
        holds: Mapping[str, frozenset[str] | None] | None = None,
        *,
        block: int = 4,
        seats: int = 2,
        pause_s: float = 0.0,
    ) -> None:
        self._holds = {"lane-0": None} if holds is None else dict(holds)
        self._block, self._seats, self._pause_s = block, seats, pause_s
        self.asked: list[tuple[str, str, list[int]]] = []
        """Lane, target and line numbers of each call."""
        self.poison: set[int] = set()
        """Lines that take whoever is asked along."""
        self.bad: set[int] = set()
        """Lines that are refused."""
        self.later: dict[int, int] = {}
        """Times that a line is put off."""
        self.hopeless: dict[str, str] = {}
        self.away = 0
        """Times that nobody is there to be asked."""

    @property
    def seats(self) -> Sequence[Seat]:
        return [Seat(lane, lane, self._block) for lane in self._holds for _ in range(self._seats)]

    def holds(self, lane: str) -> frozenset[str] | None:
        return self._holds[lane]

    async def decide(self, tasks: Sequence[Task]) -> Sequence[Decision | LineError]:
        found: list[Decision | LineError] = []
        for task in tasks:
            if task.model == "unknown":
                found.append(LineError("model_not_found", "there is no model 'unknown'"))
            elif task.model == ROUTED_MODEL:
                word = task.messages[-1].text.split()[0]
                answer = b'{"routed":true}' if task.path == "/v1/route" else None
                found.append(Decision(f"expert-{word}@v1", 0.5, answer))
            else:
                found.append(Decision(task.model))
        return found

    async def ask(self, lane: str, lines: Sequence[Line]) -> AsyncIterator[Answer]:
        self.asked.append((lane, lines[0].target, [line.number for line in lines]))
        held = self._holds[lane]
        assert held is None or {line.target for line in lines} <= held
        await asyncio.sleep(self._pause_s)
        if self.away:
            self.away -= 1
            raise LaneLostError("away", reached=False)
        for line in lines:
            if line.number in self.poison:
                raise LaneLostError("poisoned")
        for line in lines:
            if self.later.get(line.number, 0):
                self.later[line.number] -= 1
                yield Answer(line.number, 429, b"{}", again=True)
            elif line.number in self.bad:
                body = {"error": {"message": "too long", "code": "context_length_exceeded"}}
                yield Answer(line.number, 400, json.dumps(body).encode())
            else:
                body = {"model": line.target, "asked": json.loads(line.body)}
                body["usage"] = {"completion_tokens": 3}
                yield Answer(line.number, 200, json.dumps(body).encode())

    async def refresh(self, remaining: Mapping[str, int]) -> Mapping[str, str]:
        return {t: why for t, why in self.hopeless.items() if t in remaining}
