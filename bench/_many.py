"""A bundle of many random experts over a random small Llama: what batches are measured on."""

from __future__ import annotations

import importlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.manifest import BaseEntry, Fingerprint, expert_id
from configs.schema import RouterConfig, RunConfig
from tests.cards import make_card

BASE = "small"
PROBE = list(range(40, 72))
CONTEXT = 512
MODULES = "argparse asyncio collections csv datetime decimal difflib email functools heapq html "
MODULES += "http.client inspect itertools json logging os pathlib pickle random re shutil socket "
MODULES += "sqlite3 statistics string subprocess textwrap threading tokenize turtle typing unittest"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Many:
    """A published bundle of `experts` experts of rank `rank`."""

    root: Path
    experts: int
    rank: int

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def bundle(self) -> Path:
        return self.root / f"bundle-{self.experts}-{self.rank}"

    def config(self, work: Path, slots: int, **sections: dict[str, Any]) -> RunConfig:
        serving = {
            "workers": 2,
            "gpus_per_worker": 0,
            "slots": slots,
            "host_slots": 2 * self.experts,
            "max_model_len": CONTEXT,
            "cpu_kv_cache_gib": 1,
        }
        return RunConfig.model_validate(
            {
                "bundle": {"path": str(self.bundle), "work_dir": str(work)},
                "base": {"model": str(self.base), "name": BASE},
                "data": {"train": ["unused.jsonl"]},
                "router": {"clusters": self.experts, "merge_cosine": 1.0},
                **sections,
                "serving": {**serving, **sections.get("serving", {})},
                "gateway": {"port": 0, **sections.get("gateway", {})},
            }
        )

    def lines(self, count: int, tokens: int) -> list[dict[str, Any]]:
        """Shuffled requests in OpenAI's batch format, the same number for each expert."""
        random_ = random.Random(1)
        words = " ".join(texts()).split()
        found = []
        for number in range(count):
            start = random_.randrange(len(words) - 16)
            body = {
                "model": expert_id(number % self.experts),
                "prompt": " ".join(words[start : start + 15]),
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            found.append({"custom_id": f"n{number}", "method": "POST", "url": "/v1/completions"})
            found[-1]["body"] = body
        random_.shuffle(found)
        return found


def texts() -> list[str]:
    """English and code that every Python has."""
    found = []
    for name in MODULES.split():
        if name == "turtle":
            continue  # wants a screen
        module = importlib.import_module(name)
        things = [module, *(getattr(module, key) for key in sorted(vars(module)))]
        found += [t.__doc__ for t in things if isinstance(getattr(t, "__doc__", None), str)]
    return [" ".join(text.split()) for text in dict.fromkeys(found) if len(text) > 80]


def made_many(root: Path, experts: int, rank: int) -> Many:
    """The bundle below `root`, made where it is not there yet."""
    many = Many(root.resolve(), experts, rank)
    if (many.bundle / "manifest.json").is_file():
        return many
    if not (many.base / "config.json").is_file():
        _build_base(many.base)
    _publish(many)
    return many


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _build_base(directory: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=made.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def _publish(many: Many) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from expert_trainer.base import base_digest
    from expert_trainer.bundle import ExpertDraft, publish

    config = LoraConfig(
        r=many.rank, lora_alpha=2 * many.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(many.base), config)
    digest = base_digest(many.config(many.root / "work", 8).base)
    probe = torch.tensor([PROBE])
    drafts = []
    for number in range(many.experts):
        torch.manual_seed(number + 1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        directory = many.root / f"adapters-{many.experts}-{many.rank}" / expert_id(number)
        model.save_pretrained(str(directory))
        (directory / "README.md").unlink(missing_ok=True)
        with torch.no_grad():
            logprobs = model(input_ids=probe).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, probe[0, 1:, None])[:, 0]
        card = make_card(
            number,
            fingerprint=Fingerprint(token_ids=PROBE, logprobs=chosen.tolist()),
            rank=many.rank,
            alpha=2 * many.rank,
            base_digest=digest,
        )
        drafts.append(ExpertDraft(directory, card, 1 / many.experts))
    publish(
        many.bundle,
        base=BaseEntry(name=BASE, model=str(many.base), digest=digest),
        router_dir=_router(many),
        clusters=many.experts,
        experts=drafts,
        config_digest="0" * 64,
    )


def _router(many: Many) -> Path:
    from router.embedder import load_embedder
    from router.model import Router

    directory = many.root / f"router-{many.experts}"
    config = RouterConfig(clusters=many.experts, merge_cosine=1.0)
    embedder = load_embedder(
        config.embedder, device="cpu", batch_size=config.batch_size, max_tokens=config.max_tokens
    )
    vectors = embedder.encode(texts()[: 8 * many.experts])
    router = Router.fit(vectors, vectors, config, seed=0, embedder=embedder).router
    assert router.clusters == many.experts, "every cluster has an expert"
    router.save(directory)
    return directory
