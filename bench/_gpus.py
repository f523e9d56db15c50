"""GPUs in a discrete-event simulation: lanes, LoRA slots, host memory, and what loads cost.

An engine runs so many sequences at a time; more wait in its queue. An adapter that is not in a
slot is loaded from host memory, or from disk, and vLLM loads it inside the engine's loop (its
`LRUCacheWorkerLoRAManager.add_adapter`): while it does, nothing else on that GPU moves on.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What the simulation assumes of the hardware."""

    lanes: int = 32
    """Sequences that an engine runs at a time."""
    slots: int = 32
    """Not fewer than lanes, so that a slot can always be had."""
    host_load_s: float = 0.02
    """From host memory into a slot: some 80 MB in several hundred copies."""
    disk_load_s: float = 0.2
    """From disk into host memory and a slot."""


class Gpus:
    """All GPUs, their queues and caches; told of arrivals in order."""

    def __init__(self, count: int, experts: int, host_slots: int, costs: Costs) -> None:
        self.costs = costs
        self.in_flight = [0] * count
        self.served = [0.0] * count
        """Seconds of requests begun, by GPU."""
        self.holders: list[set[int]] = [set() for _ in range(experts)]
        """GPUs in whose slots an expert is."""
        self.cold = 0
        self.disk = 0
        self.waits = array("d")
        self._host_slots = host_slots
        self._host: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(count)]
        self._slots: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(count)]
        self._queues: list[deque[tuple[float, int, float]]] = [deque() for _ in range(count)]
        self._running = [0] * count
        self._stalled_until = [0.0] * count
        self._stalls = [0.0] * count
        self._events: list[tuple[float, int, int, float, float, float]] = []
        """End, GPU, expert, the GPU's stalls at the time of entry, arrival, service."""

    def arrive(self, now: float, gpu: int, expert: int, service: float) -> None:
        """A request for an expert is sent to a GPU; `advance` to this moment first."""
        self.in_flight[gpu] += 1
        if self._running[gpu] < self.costs.lanes:
            self._start(now, gpu, now, expert, service)
        else:
            self._queues[gpu].append((now, expert, service))

    def advance(self, now: float) -> None:
        """Let everything end that ends until now."""
        events, stalls = self._events, self._stalls
        while events and events[0][0] <= now:
            end, gpu, expert, stalled, arrival, service = events[0]
            if stalls[gpu] > stalled:
                later = end + stalls[gpu] - stalled
                heapq.heapreplace(events, (later, gpu, expert, stalls[gpu], arrival, service))
                continue
            heapq.heappop(events)
            self.waits.append(end - arrival - service)
            self.in_flight[gpu] -= 1
            self._running[gpu] -= 1
            self._slots[gpu][expert] -= 1
            queue = self._queues[gpu]
            if queue:
                self._start(end, gpu, *queue.popleft())

    def prepare(self, now: float, gpu: int, expert: int) -> None:
        """Load an adapter into a GPU's host memory, because an expert now lives there."""
        if expert not in self._host[gpu]:
            self._stall(now, gpu, self.costs.disk_load_s)
        self._remember(gpu, expert)

    def fill(self, gpu: int, expert: int) -> None:
        """An adapter has been in a GPU's host memory since before the run."""
        self._remember(gpu, expert)

    def _start(self, now: float, gpu: int, arrival: float, expert: int, service: float) -> None:
        slots = self._slots[gpu]
        if expert in slots:
            slots.move_to_end(expert)
            slots[expert] += 1
        else:
            self._load(now, gpu, expert)
        self._running[gpu] += 1
        self.served[gpu] += service
        end = max(now, self._stalled_until[gpu]) + service
        heapq.heappush(self._events, (end, gpu, expert, self._stalls[gpu], arrival, service))

    def _load(self, now: float, gpu: int, expert: int) -> None:
        slots = self._slots[gpu]
        if len(slots) >= self.costs.slots:
            oldest = next(held for held, users in slots.items() if not users)
            del slots[oldest]
            self.holders[oldest].discard(gpu)
        slots[expert] = 1
        self.holders[expert].add(gpu)
        self.cold += 1
        known = expert in self._host[gpu]
        self.disk += not known
        self._stall(now, gpu, self.costs.host_load_s if known else self.costs.disk_load_s)
        self._remember(gpu, expert)

    def _stall(self, now: float, gpu: int, seconds: float) -> None:
        self._stalls[gpu] += seconds
        self._stalled_until[gpu] = max(now, self._stalled_until[gpu]) + seconds

    def _remember(self, gpu: int, expert: int) -> None:
        host = self._host[gpu]
        host[expert] = None
        host.move_to_end(expert)
        if len(host) > self._host_slots:
            host.popitem(last=False)
