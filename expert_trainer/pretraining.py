"""A small Llama and its tokenizer from nothing but text, for machines that reach no model hub.

The experts' training never comes here: it takes any base by path. This module makes such a path.
It knows nothing of clusters or adapters.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import IntrovertError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SUMMARY_FILE = "pretraining.json"
# The base is trained on plain documents, so a chat is shown to it as the text of its turns.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

Progress = Callable[[int, int, float], None]


class PretrainingError(IntrovertError):
    """The small base cannot be made from this text."""


@dataclass(frozen=True)
class SmallLlama:
    """Shape and training of the small base; the defaults have 2.6 million parameters."""

    vocabulary: int = 4096
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 3
    context: int = 1024
    """Longest context that the config admits, tokens; rotary positions cost nothing."""
    sequence_length: int = 256
    batch_rows: int = 2
    """Few rows a step: at a million tokens, more steps are worth more than larger ones."""
    tokens: int = 1_200_000
    """Tokens to train on; the corpus is repeated as needed."""
    learning_rate: float = 1.5e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.1


@dataclass(frozen=True)
class PretrainingSummary:
    """What was made, stored beside the weights."""

    parameters: int
    tokens: int
    final_loss: float
    """Mean training loss over the last tenth of the steps, nats per token."""
    seconds: float


def pretrain(
    texts: Sequence[str],
    directory: Path,
    *,
    shape: SmallLlama,
    seed: int,
    on_progress: Progress | None = None,
) -> PretrainingSummary:
    """Train a tokenizer and a Llama on `texts` and save both in Hugging Face's layout.

    Args:
        texts: documents, in any order.
        directory: appears by rename when everything is in it; replaced if it is there.
        shape: size of the model and of its training.
        seed: of the initial weights and the order of documents.
        on_progress: called with (step, steps, mean loss in nats per token).

    Raises:
        PretrainingError: fewer tokens than one batch.
    """
    import torch

    started = time.monotonic()
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tokenizer = train_tokenizer(texts, shape)
    stream = _token_stream(texts, tokenizer, seed)
    if len(stream) < shape.batch_rows * (shape.sequence_length + 1):
        raise PretrainingError(
            f"the corpus has {len(stream)} tokens, less than one batch of "
            f"{shape.batch_rows} rows of {shape.sequence_length}; give more text"
        )
    torch.manual_seed(seed)
    model = _new_model(shape, tokenizer)
    final_loss = _optimise(model, stream, shape, seed, on_progress)
    summary = PretrainingSummary(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=shape.tokens,
        final_loss=final_loss,
        seconds=time.monotonic() - started,
    )
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    (staging / SUMMARY_FILE).write_text(json.dumps(asdict(summary)))
    shutil.rmtree(directory, ignore_errors=True)
    staging.rename(directory)
    return summary


def train_tokenizer(texts: Sequence[str], shape: SmallLlama) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`; end of text is its only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=shape.context,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _token_stream(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, seed: int
) -> torch.Tensor:
    """All documents in a seeded order, each closed by end of text: int64 (tokens,)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    encoded = tokenizer.backend_tokenizer.encode_batch([texts[i] for i in order])
    end = tokenizer.eos_token_id
    return torch.tensor([token for document in encoded for token in (*document.ids, end)])


def _new_model(shape: SmallLlama, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _optimise(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    shape: SmallLlama,
    seed: int,
    on_progress: Progress | None,
) -> float:
    """Train in place; mean loss over the last tenth of the steps."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    steps = max(1, shape.tokens // (shape.batch_rows * shape.sequence_length))
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=shape.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=shape.weight_decay,
        fused=True,
    )
    warmup = max(1, int(steps * shape.warmup_share))

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, scale)
    losses: list[float] = []
    batches = _batches(stream, shape, seed)
    for step in range(steps):
        rows_BT = next(batches).to(device)
        # The model shifts the labels itself.
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=rows_BT, labels=rows_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if on_progress is not None:
            recent = losses[-20:]
            on_progress(step + 1, steps, sum(recent) / len(recent))
    model.to("cpu").eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def _batches(stream: torch.Tensor, shape: SmallLlama, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of rows (B, T): each pass cuts the stream at another offset and shuffles."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    length = shape.sequence_length
    while True:
        offset = int(torch.randint(0, length, (1,), generator=generator))
        rows = (len(stream) - offset) // length
        rows_NT = stream[offset : offset + rows * length].view(rows, length)
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows - shape.batch_rows + 1, shape.batch_rows):
            yield rows_NT[order[start : start + shape.batch_rows]]
