"""Training of the encoder: the embedder's first layers, taught to name its clusters.

The layers begin as the embedder's own, the table of words stays as it is, and the targets are those
of the first student: what a softmax makes of the embedder's cosines. Torch is imported when asked
for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from router.embedder import Embedder, SentenceEmbedder
from router.encoder import FORMAT, TOKENIZER, TOKENS
from router.encoder_graph import ENTRY, EPSILON, HEAD, LAYER, WORDS, layer_array
from router.guess import TEMPERATURE
from router.quantization import levels_here
from router.student_training import Floats, Indices, best_targets, loss_of, torch_threads
from router.tokens import padded, tokens_of
from router.types import OnProgress, ignore

EPOCHS = 3
MOST_TOKENS = 2_000_000
"""Tokens learned from in all, which bounds the time to minutes on a core, whatever the texts."""
BATCH = 64
SORTED = 32
"""Batches whose texts are sorted by length together, so that little is padding."""
LAYER_RATE, HEAD_RATE = 3e-4, 3e-3
WARM_UP = 0.1
DECAY = 0.01


def can_be_cut(embedder: Embedder) -> bool:
    """Whether the embedder is of the kind whose first layers can be an encoder: a BERT whose
    vectors are means over tokens."""
    if not isinstance(embedder, SentenceEmbedder):
        return False
    modules = list(embedder.model)
    config = getattr(getattr(modules[0], "auto_model", None), "config", None)
    return (
        getattr(config, "model_type", "") == "bert"
        and getattr(config, "hidden_act", "") == "gelu"
        and getattr(config, "layer_norm_eps", 0) == EPSILON
        and getattr(config, "position_embedding_type", "absolute") in ("absolute", None)
        and len(modules) > 1
        and getattr(modules[1], "pooling_mode", "") == "mean"
        and not embedder.model.prompts.get(embedder.model.default_prompt_name or "")
        and getattr(embedder.model.tokenizer, "backend_tokenizer", None) is not None
    )


def train_encoder(
    embedder: SentenceEmbedder,
    texts: Sequence[str],
    cosines: Floats,
    *,
    layers: int,
    seed: int,
    threads: int,
    on_progress: OnProgress = ignore,
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Teach the embedder's first layers; on the embedder's device.

    On a CPU the same seed, data and number of threads give the same arrays. The pace is bounded:
    of each text as many tokens are read as the embedder reads, up to `TOKENS`, and `MOST_TOKENS` in
    all.

    Args:
        embedder: one that `can_be_cut`.
        texts: N texts, at least one.
        cosines: the embedder's with all centroids, shape (N, K).
        layers: that are kept; all, where the embedder has fewer.
        seed: of the order of texts and of the head.
        threads: of torch.
        on_progress: told the batches learned and their number.

    Returns:
        Arrays and settings, as `Encoder` takes them.
    """
    import torch

    bert = _cut(embedder, layers)
    device = embedder.model.device
    limit = min(embedder.max_tokens or TOKENS, TOKENS)
    tokenizer = _tokenizer(embedder, limit)
    ids = tokens_of(tokenizer, texts, limit)
    targets = best_targets(cosines, np.arange(len(texts)))
    rng = np.random.default_rng(seed)
    width, clusters = bert.config.hidden_size, targets.total
    weight = rng.standard_normal((width, clusters), dtype=np.float32) * np.float32(width**-0.5)
    head = [
        torch.nn.Parameter(torch.from_numpy(part).to(device))
        for part in (weight, np.zeros(clusters, dtype=np.float32))
    ]
    body = [part for part in bert.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": LAYER_RATE}, {"params": head, "lr": HEAD_RATE}], weight_decay=DECAY
    )
    with torch_threads(threads), torch.random.fork_rng():
        torch.manual_seed(seed)
        bert.train()
        lengths = [len(tokens) for tokens in ids]
        steps = _steps(lengths)
        for step, (rate, places) in enumerate(_schedule(lengths, steps, rng)):
            on_progress("teaching the encoder", step, steps)
            for group, full in zip(optimizer.param_groups, (LAYER_RATE, HEAD_RATE), strict=True):
                group["lr"] = full * rate
            pooled_BD = _pooled(bert, [ids[place] for place in places], device)
            logits_BK = (pooled_BD @ head[0] + head[1]).cpu()
            optimizer.zero_grad()
            loss_of(logits_BK, targets, places).backward()
            optimizer.step()
    on_progress("teaching the encoder", steps, steps)
    arrays = _arrays(bert, limit) | {
        name: part.detach().cpu().numpy() for name, part in zip(HEAD, head, strict=True)
    }
    arrays[TOKENIZER] = np.frombuffer(tokenizer.to_str().encode(), dtype=np.uint8)
    settings = {
        "format": FORMAT,
        "temperature": TEMPERATURE,
        "clusters": clusters,
        "layers": len(bert.encoder.layer),
        "heads": bert.config.num_attention_heads,
        "levels": levels_here(),
    }
    return arrays, settings


def _cut(embedder: SentenceEmbedder, layers: int) -> Any:
    """A copy of the transformer with its first layers, its tables frozen."""
    transformer: Any = embedder.model[0]
    kept = transformer.auto_model.encoder.layer
    transformer.auto_model.encoder.layer = kept[:layers]
    try:
        bert = copy.deepcopy(transformer.auto_model)
    finally:
        transformer.auto_model.encoder.layer = kept
    bert.embeddings.requires_grad_(False)
    if getattr(bert, "pooler", None) is not None:
        bert.pooler = None
    return bert


def _tokenizer(embedder: SentenceEmbedder, limit: int) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(embedder.model.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return tokenizer


def _steps(lengths: Sequence[int]) -> int:
    """Batches to learn, from the texts' tokens."""
    mean = max(1.0, float(np.mean(lengths)))
    return max(1, min(EPOCHS * len(lengths), int(MOST_TOKENS / mean)) // BATCH)


def _schedule(
    lengths: Sequence[int], steps: int, rng: np.random.Generator
) -> Iterator[tuple[float, Indices]]:
    # Up in a straight line, then down to nothing; every text once before any comes again.
    sizes = np.array(lengths)
    waiting: list[Indices] = []
    for step in range(steps):
        if not waiting:
            order = rng.permutation(len(sizes))
            for start in range(0, len(order), BATCH * SORTED):
                some = order[start : start + BATCH * SORTED]
                some = some[np.argsort(sizes[some], kind="stable")]
                waiting += [some[at : at + BATCH] for at in range(0, len(some), BATCH)]
            waiting = [waiting[place] for place in rng.permutation(len(waiting))]
        yield min(1.0, (step + 1) / (steps * WARM_UP)) * (1 - step / steps), waiting.pop()


def _pooled(bert: Any, ids: Sequence[Sequence[int]], device: Any) -> Any:
    import torch

    ids_BT, mask_BT = padded(ids)
    mask_BT[:, 0] = 1
    mask = torch.from_numpy(mask_BT).to(device)
    hidden_BTD = bert(
        input_ids=torch.from_numpy(ids_BT).to(device), attention_mask=mask
    ).last_hidden_state
    mask_BT1 = mask.unsqueeze(-1).to(hidden_BTD.dtype)
    return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)


def _arrays(bert: Any, limit: int) -> dict[str, npt.NDArray[Any]]:
    """The transformer's weights as `Encoder` names them, with places for `limit` tokens; products
    from the right."""

    def of(module: Any) -> list[npt.NDArray[Any]]:
        weight, bias = (
            part.detach().float().cpu().numpy() for part in (module.weight, module.bias)
        )
        return [np.ascontiguousarray(weight.T) if weight.ndim == 2 else weight, bias]

    table = bert.embeddings
    kinds = table.token_type_embeddings.weight[0]
    found = {
        WORDS: table.word_embeddings.weight.detach().cpu().half().numpy(),
        ENTRY[0]: (table.position_embeddings.weight[:limit] + kinds).detach().cpu().numpy(),
    }
    found[ENTRY[1]], found[ENTRY[2]] = of(table.LayerNorm)
    for number, layer in enumerate(bert.encoder.layer):
        own = layer.attention.self
        queries, keys, values = of(own.query), of(own.key), of(own.value)
        parts = [
            np.concatenate([queries[0], keys[0], values[0]], axis=1),
            np.concatenate([queries[1], keys[1], values[1]]),
            *of(layer.attention.output.dense),
            *of(layer.attention.output.LayerNorm),
            *of(layer.intermediate.dense),
            *of(layer.output.dense),
            *of(layer.output.LayerNorm),
        ]
        found |= {layer_array(number, name): part for name, part in zip(LAYER, parts, strict=True)}
    return found
