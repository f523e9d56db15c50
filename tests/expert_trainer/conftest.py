"""A tiny random base, a tiny corpus and the configs that go with them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig

VOCABULARY = 400
TOPICS = {
    "sea": "boat wave harbour sail anchor tide captain island storm net",
    "kitchen": "flour oven butter sugar knead bread recipe salt bake spoon",
    "code": "function return module compile string pointer thread loop parse integer",
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def sentences(topic: str, count: int, seed: int) -> list[str]:
    """Documents of 12 to 40 words, half of them the topic's own."""
    order = random.Random(f"{topic}{seed}")
    words = TOPICS[topic].split()
    common = ["the", "and", "of", "a", "with", "to", "from", "is", "was", "in"]
    return [
        " ".join(order.choice(words if order.random() < 0.6 else common) for _ in range(size))
        for size in (order.randint(12, 40) for _ in range(count))
    ]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices gain nothing from a second thread, and lose much beside busy neighbours."""
    import torch

    torch.set_num_threads(1)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (hidden 32, 2 layers) and a byte-level BPE tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([t for topic in TOPICS for t in sentences(topic, 50, 0)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three topics, no two documents equal: train.jsonl, valid.jsonl and test.jsonl."""
    directory = tmp_path_factory.mktemp("corpus")
    for seed, (name, count) in enumerate({"train": 30, "valid": 8, "test": 8}.items()):
        rows = [
            {"id": f"{name}-{topic}-{i}", "text": text, "domain": topic}
            for topic in TOPICS
            for i, text in enumerate(sentences(topic, count, seed))
        ]
        write_jsonl(directory / f"{name}.jsonl", rows)
    return directory


@pytest.fixture(scope="session")
def static_embedder(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real but quick embedder: the mean of random vectors of the words' tokens."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(base_dir / "tokenizer.json"))
    directory = tmp_path_factory.mktemp("embedder")
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)])
    model.save(str(directory))
    return str(directory)


@pytest.fixture
def make_config(base_dir: Path, corpus_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run on the tiny base and corpus; keyword arguments update the `experts` section."""

    def make(**experts: Any) -> RunConfig:
        return RunConfig.model_validate(
            {
                "seed": 5,
                "bundle": {"path": str(tmp_path / "bundle")},
                "base": {"model": str(base_dir), "name": "tiny"},
                "data": {
                    name: [str(corpus_dir / f"{name}.jsonl")] for name in ("train", "valid", "test")
                },
                "router": {"clusters": 3},
                "experts": {
                    "rank": 4,
                    "alpha": 8,
                    "sequence_length": 64,
                    "batch_rows": 4,
                    "tokens_per_expert": 4000,
                    "learning_rate": 1e-2,
                    "actors": 2,
                    "baseline_learning_rates": [1e-2, 2e-2],
                }
                | experts,
            }
        )

    return make
