"""Cards and runs for the tests of what a person sees."""

from collections.abc import Callable

import pytest

from configs.manifest import ExpertCard
from expert_trainer.types import ActorUp, ExpertProgress, ExpertStarted, PoolStarted
from tests.cards import make_card as any_card


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_card() -> Callable[..., ExpertCard]:
    def make(expert: str = "expert-0007", **changes: object) -> ExpertCard:
        facts = {"top_terms": ["array", "index", "matrix", "tensor", "solver"], "seconds": 41.0}
        facts |= {"tokens": 500, "tokens_seen": 1000, "steps": 10}
        facts |= {"heldout_loss_base": 3.0, "heldout_loss_expert": 2.7}
        facts["reason"] = "held-out loss 2.7000 against the base's 3.0000 nats per token"
        return any_card(7, **facts | {"id": expert} | changes)

    return make


@pytest.fixture
def crowd() -> list[PoolStarted | ActorUp | ExpertStarted | ExpertProgress]:
    """64 actors on 8 nodes, each a few steps into two of 500 experts, the last one still idle."""
    events: list[PoolStarted | ActorUp | ExpertStarted | ExpertProgress] = [
        PoolStarted(queued=500, actors=66, steps=50_000)
    ]
    for index in range(64):
        actor = f"trainer-a1b2c3-{index}.1"
        events.append(ActorUp(actor, f"node-{index // 8}", f"cuda:{index % 8}", 1000 + index))
        if index == 63:
            continue
        for member in (2 * index, 2 * index + 1):
            expert = f"expert-{member:04d}"
            events.append(ExpertStarted(expert, actor, 300 - index, 1))
            events.append(ExpertProgress(expert, actor, 10, 300 - index, 2.5, 20_000, 500.0))
    return events
