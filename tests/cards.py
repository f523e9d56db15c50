"""Cards of experts, for tests in which most of what a card says does not matter."""

from typing import Any

from configs.manifest import ExpertCard, Fingerprint, expert_id


def make_card(cluster: int = 0, **changes: Any) -> ExpertCard:
    """An admitted expert's card; keyword arguments are what the test is about."""
    values = {
        "id": expert_id(cluster),
        "cluster": cluster,
        "base_digest": "a" * 64,
        "documents": 3,
        "tokens": 100,
        "tokens_seen": 200,
        "steps": 2,
        "seed": 1,
        "rank": 2,
        "alpha": 4,
        "rslora": False,
        "target_modules": ["q_proj"],
        "learning_rate": 1e-3,
        "top_terms": ["sea", "boat"],
        "loss_curve": [],
        "heldout_documents": 1,
        "heldout_tokens": 10,
        "heldout_loss_base": 2.5,
        "heldout_loss_expert": 2.0,
        "state": "admitted",
        "reason": "2.000 against 2.500",
        "fingerprint": Fingerprint(token_ids=[1, 2], logprobs=[-0.5]),
        "seconds": 0.1,
        "device": "cpu",
        "created": "2026-01-01T00:00:00+00:00",
        "code_version": "0.1.0",
    }
    return ExpertCard.model_validate(values).model_copy(update=changes)
