"""Fit, train and evaluate on the tiny base, on a real Ray."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.manifest import ExpertCard
from configs.schema import BundleConfig, RunConfig
from expert_trainer import embedding
from expert_trainer.bundle import open_bundle, open_published
from expert_trainer.errors import (
    BaseModelError,
    NotPublishedError,
    StaleBundleError,
    UnknownExpertError,
)
from expert_trainer.evaluation import evaluate
from expert_trainer.fitting import fit, read_fit
from expert_trainer.runtime import ray_session
from expert_trainer.storage import Storage
from expert_trainer.training import expert_jobs, train
from expert_trainer.types import (
    ActorUp,
    ExpertFailed,
    ExpertFinished,
    ExpertProgress,
    ExpertReused,
    ExpertStarted,
    JobFinished,
    PoolStarted,
)
from router.model import Router
from tests.expert_trainer.conftest import sentences, write_jsonl

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with ray_session(cpus=2):
        yield


@pytest.fixture
def embeds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit embeds in this process, though a cluster is there: actors take long to start."""
    monkeypatch.setattr(embedding, "wants_ray", lambda documents: False)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs it leaves a trained run."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained(
    make_config: Callable[..., RunConfig], embeds_here: None, first_run: Path, tmp_path: Path
) -> RunConfig:
    """A run of few steps that is trained and published, in the test's own directory."""
    config = make_config(tokens_per_expert=500)
    if not (first_run / "bundle").exists():
        bundle = BundleConfig(path=str(first_run / "bundle"))
        assert train(config.model_copy(update={"bundle": bundle})).trained == ALL
    for name in ("bundle", "bundle.work"):
        shutil.copytree(first_run / name, tmp_path / name, symlinks=True)
    return config


def ids(events: list[Any], kind: type) -> list[str]:
    return sorted(event.id for event in events if isinstance(event, kind))


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


ALL = ["expert-0000", "expert-0001", "expert-0002"]


def test_from_corpus_to_bundle_and_evaluation(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    with pytest.raises(NotPublishedError):
        open_bundle(config.bundle.path)

    events: list[Any] = []
    summary = train(config, events.append)
    assert isinstance(events[0], PoolStarted)
    assert (events[0].queued, events[0].actors) == (3, 2)
    assert ids(events, ExpertFinished) == summary.trained == summary.admitted == ALL
    assert (summary.failed, summary.held_back) == ([], [])

    bundle = open_bundle(config.bundle.path)
    assert bundle.manifest.version == summary.version
    assert bundle.manifest.base.name == "tiny"
    assert bundle.manifest.router.clusters == 3
    assert sum(entry.mass for entry in bundle.manifest.experts) == pytest.approx(1)
    for entry in bundle.manifest.experts:
        card = bundle.card(entry)
        assert card.heldout_loss_expert < card.heldout_loss_base - 0.2
        assert card.steps == math.ceil(4000 / (64 * 4))
        assert 0.8 * 4000 < card.tokens_seen <= card.steps * 64 * 4
        assert card.loss_curve[-1].step == card.steps
        assert card.base_digest == bundle.manifest.base.digest
        config_file = bundle.expert_dir(entry) / "adapter_config.json"
        assert json.loads(config_file.read_text())["base_model_name_or_path"] == "tiny"
    elsewhere = bundle.manifest.base.model_copy(update={"model": ""})
    manifest = bundle.manifest.model_copy(update={"base": elsewhere})
    assert str(Path(config.base.model).parent) not in manifest.model_dump_json()
    assert Router.load(bundle.router_dir).clusters == 3

    # the same command again: nothing is trained, nothing changes
    before = tree(Path(config.bundle.path) / "experts")
    events.clear()
    again = train(config, events.append)
    assert ids(events, ExpertReused) == ALL
    assert (again.trained, again.tokens_seen, again.version) == ([], 0, summary.version)
    assert tree(Path(config.bundle.path) / "experts") == before

    # adapters scaled by another factor are not evaluated
    with pytest.raises(BaseModelError, match=r"experts\.alpha=8, but .* says 16"):
        evaluate(make_config(alpha=16))

    # evaluation, the single adapter included, and the second time reused
    result = evaluate(config)
    arms = result.overall
    assert result.split == "test"
    assert arms.documents == 24
    assert arms.single is not None
    assert arms.hindsight <= arms.routed < arms.base
    assert arms.routed < arms.random
    assert arms.routed < 0.9 * arms.base
    assert result.headroom_closed is not None
    assert 90 < result.headroom_closed <= 100
    assert sum(c.arms.tokens for c in result.clusters if c.arms) == arms.tokens
    assert [attempt.learning_rate for attempt in result.single] == [1e-2, 2e-2]
    assert sum(attempt.chosen for attempt in result.single) == 1
    for attempt in result.single:
        assert attempt.steps == sum(bundle.card(e).steps for e in bundle.manifest.experts)
        assert attempt.tokens_seen == pytest.approx(result.experts_tokens_seen, rel=0.1)
    events.clear()
    repeated = evaluate(config, events.append)
    assert ids(events, ExpertStarted) == sorted(
        ["measure base", "measure single", *(f"measure {name}" for name in ALL)]
    )
    assert repeated.model_copy(update={"seconds": 0}) == result.model_copy(update={"seconds": 0})
    short = evaluate(config, baseline=False)
    assert short.overall.single is None
    assert short.overall.routed == arms.routed
    json.loads(short.model_dump_json())


def test_a_gate_that_nobody_passes_holds_back_without_training(
    make_config: Callable[..., RunConfig], trained: RunConfig
) -> None:
    first = open_bundle(trained.bundle.path).manifest
    strict = make_config(tokens_per_expert=500, gate_margin=50.0)
    events: list[Any] = []
    summary = train(strict, events.append)
    assert ids(events, ExpertReused) == ALL, "the gate is not part of an adapter"
    assert (summary.admitted, summary.held_back) == ([], ALL)
    assert summary.version != first.version
    bundle = open_bundle(strict.bundle.path)
    assert bundle.manifest.served == []
    assert [entry.version for entry in bundle.manifest.experts]
    arms = evaluate(strict, baseline=False).overall
    assert arms.routed == arms.base == arms.hindsight


def test_changed_settings_train_again(
    make_config: Callable[..., RunConfig], trained: RunConfig
) -> None:
    same = make_config(tokens_per_expert=500, actors=1, max_retries=0)
    assert train(same).trained == []
    assert train(make_config(tokens_per_expert=500, rank=2)).trained == ALL


@pytest.mark.usefixtures("embeds_here")
def test_a_damaged_shard_is_reported_and_the_rest_is_published(
    make_config: Callable[..., RunConfig],
) -> None:
    config = make_config(tokens_per_expert=500, max_retries=1)
    summary = fit(config)
    shard = summary.shard(Storage(config.bundle.work), summary.clusters[1])
    content = shard.read()
    shard.directory.write(shard.name, content + b"{}\n")
    events: list[Any] = []
    result = train(config, events.append)
    assert [failure.id for failure in result.failed] == ["expert-0001"]
    assert "changed after the fit" in result.failed[0].cause
    assert set(ids(events, ExpertFailed)) == {"expert-0001"}
    assert result.trained == ["expert-0000", "expert-0002"]
    served = [entry.id for entry in open_bundle(config.bundle.path).manifest.served]
    assert set(served) <= {"expert-0000", "expert-0002"}

    # mended, the same command trains what is missing and nothing else
    shard.directory.write(shard.name, content)
    assert train(config).trained == ["expert-0001"]
    assert len(open_bundle(config.bundle.path).manifest.experts) == 3


def test_one_expert_is_trained_again_and_the_others_stay_byte_for_byte(
    make_config: Callable[..., RunConfig], trained: RunConfig
) -> None:
    config = trained
    experts = Path(config.bundle.path) / "experts"
    before = tree(experts)
    events: list[Any] = []
    same = train(config, events.append, only=["expert-0001"])
    assert (same.trained, ids(events, ExpertReused)) == (["expert-0001"], [])
    after = tree(experts)
    assert {name: after[name] for name in before} == before

    other = make_config(tokens_per_expert=500, learning_rate=2e-2)
    changed = train(other, only=["expert-0001"])
    assert changed.trained == ["expert-0001"]
    after = tree(experts)
    new = {name for name in after if name not in before}
    assert new
    assert all(name.startswith("expert-0001/") for name in new)
    assert {name: after[name] for name in before} == before
    cards = {c.id: c for c in cards_of(config)}
    assert [cards[name].learning_rate for name in ALL] == [1e-2, 2e-2, 1e-2]

    with pytest.raises(UnknownExpertError, match="no cluster for expert-0007") as unknown:
        train(config, only=["expert-0007"])
    assert unknown.value.exit_code == 2
    with pytest.raises(StaleBundleError, match="without --only"):
        train(reseeded(config), only=["expert-0001"])


def reseeded(config: RunConfig) -> RunConfig:
    """The same run with another router in the same place."""
    return config.model_copy(
        update={"router": config.router.model_copy(update={"clusters": 2})}, deep=True
    )


def cards_of(config: RunConfig) -> list[ExpertCard]:
    bundle = open_bundle(config.bundle.path)
    return bundle.cards(bundle.manifest.experts)


@pytest.mark.usefixtures("embeds_here")
def test_new_documents_retrain_the_experts_that_gain_enough(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tokens_per_expert=500, retrain_growth=0.3)
    first = train(config)
    before = {card.id: card for card in cards_of(config)}
    [sea] = [name for name, card in before.items() if "boat" in card.top_terms]
    few = write_jsonl(tmp_path / "few.jsonl", rows("sea", 2))
    assert train(config, add_data=[str(few)]).trained == []
    assert {card.id: card for card in cards_of(config)} == before

    many = write_jsonl(tmp_path / "many.jsonl", rows("sea", 20))
    grown = train(config, add_data=[str(many)])
    assert grown.trained == [sea]
    assert grown.version != first.version
    after = {card.id: card for card in cards_of(config)}
    assert after[sea].documents >= before[sea].documents + 20
    assert {n: c for n, c in after.items() if n != sea} == {
        n: c for n, c in before.items() if n != sea
    }
    assert sum(e.mass for e in open_bundle(config.bundle.path).manifest.experts) == (
        pytest.approx(1)
    )
    # the same file once more, and a plain run, find nothing to do; whoever has a fit in hand
    # hands it on, and the corpus is not read again to find out whose it is
    assert train(config).trained == []
    summary = read_fit(config)
    monkeypatch.setattr("expert_trainer.fitting.fit_digest", no_digest)
    assert train(config, add_data=[str(many)], fit=summary).trained == []


def no_digest(config: RunConfig) -> str:
    raise AssertionError("the corpus is read again")


def rows(topic: str, count: int) -> list[dict[str, str]]:
    return [
        {"id": f"new-{topic}-{count}-{index}", "text": text}
        for index, text in enumerate(sentences(topic, count, 100 + count))
    ]


@pytest.mark.usefixtures("embeds_here")
def test_experts_start_from_one_adapter_within_the_same_tokens(
    make_config: Callable[..., RunConfig],
) -> None:
    plain = make_config(tokens_per_expert=4000)
    budget = sum(job_steps(plain))
    config = make_config(tokens_per_expert=4000, init="shared", shared_share=0.25)
    events: list[Any] = []
    summary = train(config, events.append)
    shared = [event for event in events if isinstance(event, JobFinished)]
    assert [event.id for event in shared] == ["shared"]
    cards = cards_of(config)
    assert {card.init for card in cards} == {shared[0].outcome.digest}
    steps = shared[0].outcome.steps + sum(card.steps for card in cards)
    assert budget - len(cards) <= steps <= budget
    assert summary.tokens_seen == shared[0].outcome.tokens_seen + sum(c.tokens_seen for c in cards)
    # the starting point is worth something: the first step's loss is below that from scratch
    from_scratch = train(plain)
    assert from_scratch.trained == ALL
    scratch = {card.id: card for card in cards_of(plain)}
    for card in cards:
        assert card.loss_curve[0].loss < scratch[card.id].loss_curve[0].loss


def job_steps(config: RunConfig) -> list[int]:
    return [job.steps for job in expert_jobs(config, fit(config), "a" * 64)]


@pytest.mark.usefixtures("embeds_here")
@pytest.mark.parametrize("kind", ["driver", "actor"])
def test_a_run_that_was_killed_goes_on_and_ends_bit_identical(
    make_config: Callable[..., RunConfig], tmp_path: Path, kind: str
) -> None:
    settings = {"tokens_per_expert": 30_000, "checkpoint_s": 0.01, "fused": 2, "actors": 1}
    undisturbed = make_config(**settings)
    train(undisturbed)
    expected = adapters(undisturbed)
    broken = undisturbed.model_copy(
        update={"bundle": BundleConfig(path=str(tmp_path / "broken"))}, deep=True
    )
    if kind == "driver":
        kill_driver(broken, tmp_path)
    else:
        train(broken, ActorKiller())
    events: list[Any] = []
    summary = train(broken, events.append)
    assert (summary.failed, summary.admitted) == ([], ALL)
    assert adapters(broken) == expected


def adapters(config: RunConfig) -> dict[str, str]:
    return {
        name: digest
        for name, digest in tree(Path(config.bundle.path) / "experts").items()
        if name.endswith(".safetensors")
    }


class ActorKiller:
    """Kills the actor once, in the middle of an expert."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}
        self._killed = False

    def __call__(self, event: Any) -> None:
        if isinstance(event, ActorUp):
            self._pids[event.actor] = event.pid
        if isinstance(event, ExpertProgress) and event.step > 5 and not self._killed:
            os.kill(self._pids[event.actor], signal.SIGKILL)
            self._killed = True


DRIVER = """
import os, signal, sys
from configs.schema import RunConfig
from expert_trainer.training import train
from expert_trainer.types import ExpertProgress

def listen(event):
    if isinstance(event, ExpertProgress) and event.step > 5:
        os.kill(os.getpid(), signal.SIGKILL)

train(RunConfig.model_validate_json(open(sys.argv[1]).read()), listen)
"""


def kill_driver(config: RunConfig, directory: Path) -> None:
    """Train in a process that is killed in the middle of an expert."""
    path = directory / "config.json"
    path.write_text(config.model_dump_json())
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, str(path)], capture_output=True, timeout=600, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    assert not (Path(config.bundle.path) / "manifest.json").exists(), "it was not done yet"


@pytest.mark.usefixtures("embeds_here")
def test_nodes_need_no_common_disk(
    make_config: Callable[..., RunConfig], ftp_url: str, tmp_path: Path
) -> None:
    bundle = BundleConfig(path=f"{ftp_url}/bundle", scratch_dir=str(tmp_path / "scratch"))
    config = make_config(tokens_per_expert=500).model_copy(update={"bundle": bundle})
    summary = train(config)
    assert summary.trained == ALL
    assert "open-sesame" not in summary.bundle
    opened = open_published(config.bundle)
    assert [entry.id for entry in opened.manifest.experts] == ALL
    arms = evaluate(config, baseline=False).overall
    assert arms.routed < arms.base
    again = train(config)
    assert (again.trained, again.version) == ([], summary.version)
    local = {path.name for path in (tmp_path / "scratch").iterdir()}
    assert not local & {"shards", "experts", "router", "fit.json"}
