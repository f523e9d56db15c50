"""A served world small enough to build in seconds and real in every part.

A random two-layer Llama with a byte-level tokenizer and a chat template, three LoRA experts with
random weights, each with the fingerprint that transformers and peft compute for it, published as a
bundle. Built once for a test session.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.manifest import BaseEntry, Fingerprint, expert_id
from configs.schema import RouterConfig, RunConfig
from tests.cards import make_card

INTROVERT = Path(sys.executable).with_name("introvert")
EXPERTS = 3
RANK = 4
BASE_NAME = "tiny"
PROBE = list(range(40, 72))
MAX_MODEL_LEN = 256
TOPICS = (
    ("roasting potatoes", "baking sourdough bread", "simmering tomato soup", "whisking egg whites"),
    ("sorting a list in Python", "a recursive function", "compiling C code", "parsing JSON files"),
    ("the orbit of Jupiter", "a distant galaxy", "a lunar eclipse", "the rings of Saturn"),
)
"""One for each expert; which cluster becomes which is the router's affair."""
FORMS = ("how I learnt about", "a short introduction to", "questions and answers on")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class World:
    """A base and a published bundle."""

    root: Path
    base: Path
    bundle: Path

    def config(self, work: Path, **sections: dict[str, Any]) -> RunConfig:
        """A run that serves the bundle on two workers; a free port unless `gateway` says which."""
        serving = {
            "workers": 2,
            "max_replicas": 1,  # who lives where is the test's to know
            "gpus_per_worker": 0,
            "max_model_len": MAX_MODEL_LEN,
            "cpu_kv_cache_gib": 1,
        }
        return RunConfig.model_validate(
            {
                "bundle": {"path": str(self.bundle), "work_dir": str(work)},
                "base": {"model": str(self.base), "name": BASE_NAME},
                "data": {"train": ["unused.jsonl"]},
                **sections,
                "serving": {**serving, **sections.get("serving", {})},
                "gateway": {"port": 0, **sections.get("gateway", {})},
            }
        )


@dataclass
class Command:
    """One `introvert serve`, alone in its process group as a terminal would start it."""

    process: subprocess.Popen[bytes]
    work: Path
    url: str = ""
    seconds_to_ready: float = 0.0

    @property
    def output(self) -> str:
        return (self.work / "stdout").read_text()

    @property
    def errors(self) -> str:
        return (self.work / "stderr").read_text()

    def wait_ready(self, seconds: float) -> None:
        began = time.monotonic()
        while "ready: " not in self.output:
            assert self.process.poll() is None, self.errors
            assert time.monotonic() - began < seconds, self.errors
            time.sleep(0.05)
        self.url = self.output.partition("ready: ")[2].partition("/v1")[0]
        self.seconds_to_ready = time.monotonic() - began

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        """For tests that failed half way."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()


def start_serve(config: RunConfig, work: Path) -> Command:
    (work / "config.yaml").write_text(config.model_dump_json())
    with (work / "stdout").open("wb") as output, (work / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [INTROVERT, "serve", work / "config.yaml"],
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    return Command(process, work)


@pytest.fixture(scope="session")
def serve() -> Callable[[RunConfig, Path], Command]:
    return start_serve


@pytest.fixture(scope="session")
def introvert() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command to its end."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [INTROVERT, *arguments], capture_output=True, text=True, timeout=300, check=False
        )

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture(scope="session")
def left_behind() -> Iterator[Callable[[], list[str]]]:
    """Lists the processes that the tests started, wherever in the system's tree they are now."""
    mark = ("INTROVERT_TEST_SESSION", uuid.uuid4().hex)
    os.environ[mark[0]] = mark[1]

    def _left_behind() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(mark[0]) == mark[1]
                ended = process.status() == psutil.STATUS_ZOMBIE
                if marked and not ended and process.pid != os.getpid():
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
            except psutil.Error:
                continue
        return found

    yield _left_behind
    del os.environ[mark[0]]


def build_world(root: Path) -> World:
    world = World(root=root, base=root / "base", bundle=root / "bundle")
    build_base(world.base)
    build_router(root / "router")
    build_bundle(world, world.bundle, seed=1)
    return world


def build_bundle(world: World, path: Path, seed: int) -> None:
    """A bundle of other experts for every seed, with the world's router."""
    from expert_trainer.base import base_digest
    from expert_trainer.bundle import ExpertDraft, publish

    digest = base_digest(world.config(world.root / "work").base)
    drafts = []
    for cluster in range(EXPERTS):
        directory = world.root / "adapters" / str(seed) / expert_id(cluster)
        fingerprint = build_expert(world.base, directory, seed=cluster + seed)
        mass = (EXPERTS - cluster) / sum(range(1, EXPERTS + 1))
        facts = {"rank": RANK, "alpha": 2 * RANK, "base_digest": digest}
        card = make_card(cluster, fingerprint=fingerprint, **facts)
        drafts.append(ExpertDraft(directory, card, mass))
    publish(
        path,
        base=BaseEntry(name=BASE_NAME, model=str(world.base), digest=digest),
        router_dir=world.root / "router",
        clusters=EXPERTS,
        experts=drafts,
        config_digest="0" * 64,
    )


@pytest.fixture(scope="session")
def next_bundle(world: World) -> Path:
    """Beside the served one: the same router, other experts."""
    path = world.root / "bundle-next"
    build_bundle(world, path, seed=11)
    return path


def build_router(directory: Path) -> Path:
    """A router with a cluster for each of `TOPICS`, fitted with the packaged embedder."""
    from router.embedder import load_embedder
    from router.model import Router

    texts = [f"{form} {thing}" for things in TOPICS for thing in things for form in FORMS]
    config = RouterConfig(clusters=len(TOPICS), abstain_quantile=0.0)
    embedder = load_embedder(
        config.embedder, device="cpu", batch_size=config.batch_size, max_tokens=config.max_tokens
    )
    vectors = embedder.encode(texts)
    router = Router.fit(vectors, vectors, config, seed=0, embedder=embedder).router
    assert router.clusters == EXPERTS
    router.save(directory)
    return directory


def build_base(directory: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_level.train_from_iterator(["a quick brown fox and the lazy dog"] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def build_expert(base: Path, directory: Path, seed: int) -> Fingerprint:
    """A random adapter and what transformers and peft say of the probe with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(directory))
    (directory / "README.md").unlink(missing_ok=True)
    ids = torch.tensor([PROBE])
    with torch.no_grad():
        logprobs = adapted(input_ids=ids).logits[0, :-1].log_softmax(-1)
    chosen = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
    return Fingerprint(token_ids=PROBE, logprobs=chosen.tolist())
