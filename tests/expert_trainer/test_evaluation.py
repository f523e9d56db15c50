"""What evaluation checks and routes before it measures; the whole is in test_training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from configs.manifest import BaseEntry
from configs.schema import RunConfig
from expert_trainer.bundle import Bundle, ExpertDraft, open_bundle, publish
from expert_trainer.errors import BaseModelError, StaleBundleError
from expert_trainer.evaluation import evaluate, serving_router, serving_routes
from expert_trainer.fitting import ROUTER_DIR, fit
from expert_trainer.training import base_entry
from expert_trainer.types import Document
from router.conversation import Message
from router.model import Router
from tests.cards import make_card


def publish_fit(config: RunConfig, base: BaseEntry) -> Bundle:
    """Publish the fit in the work directory, without any expert."""
    publish(
        config.bundle.path,
        base=base,
        router_dir=Path(config.bundle.work) / ROUTER_DIR,
        clusters=3,
        experts=[],
        config_digest="c" * 64,
    )
    return open_bundle(config.bundle.path)


def test_documents_are_routed_as_serving_routes_them(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    config = config.model_copy(
        update={"router": config.router.model_copy(update={"device": "cpu"})}
    )
    fit(config)
    bundle = publish_fit(config, base_entry(config))
    load, devices = Router.load, []

    def recording_load(directory: Path, **settings: Any) -> Router:
        devices.append(settings["device"])
        return load(directory, **settings)

    monkeypatch.setattr(Router, "load", recording_load)
    opening = "boat wave harbour sail anchor tide captain island"
    follow_up = "and from the was it"
    turns = [("user", opening), ("assistant", "flour oven"), ("user", follow_up)]
    chat = tuple({"role": role, "content": text} for role, text in turns)
    answered = (*chat, {"role": "assistant", "content": "flour oven butter sugar"})
    kept, plain, home = serving_routes(
        serving_router(config, bundle),
        [
            Document(id="chat", messages=answered),
            Document(id="plain", text=follow_up),
            Document(id="home", text=opening),
        ],
    )
    assert devices == ["cpu"]
    assert kept.expert == home.expert != plain.expert, "the chat stays where it began"
    router = load(bundle.router_dir, device="cpu")
    request = [Message(role, text) for role, text in turns]
    assert kept.expert == router.route_conversations([request])[0].expert
    assert plain.expert == router.route([follow_up])[0].expert


def test_a_bundle_of_another_base_or_fit_is_refused(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    fit(config)
    base = base_entry(config)
    publish_fit(config, base.model_copy(update={"digest": "a" * 64}))
    with pytest.raises(StaleBundleError, match=r"experts of another base .* than base\.model"):
        evaluate(config)
    publish_fit(config, base)
    other = config.model_copy(update={"seed": config.seed + 1})
    fit(other)
    with pytest.raises(StaleBundleError, match="run `introvert train` to publish the new fit"):
        evaluate(other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 16}, "experts.alpha=8, but this run's config says 16"),
        ({"rslora": True}, "=False"),
    ],
)
def test_experts_of_another_scaling_are_refused(
    make_config: Callable[..., RunConfig], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    config = make_config()
    fit(config)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(save({"a": np.zeros(2)}))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    base = base_entry(config)
    card = make_card(base_digest=base.digest, rank=config.experts.rank, alpha=config.experts.alpha)
    publish(
        config.bundle.path,
        base=base,
        router_dir=Path(config.bundle.work) / ROUTER_DIR,
        clusters=3,
        experts=[ExpertDraft(tmp_path / "adapter", card, 1.0)],
        config_digest="c" * 64,
    )
    with pytest.raises(BaseModelError, match=f"expert-0000 was trained with .*{words}"):
        evaluate(make_config(**changes))
