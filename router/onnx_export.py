"""The embedder as an ONNX graph, so that serving needs no torch and computes it several times as
fast.

The graph takes token ids and gives unit vectors: transformer, pooling and normalisation in one, in
the model's own precision, its attention and normalisation layers fused where ONNX Runtime knows
how. Knows nothing of routers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router.embedder import SentenceEmbedder
from router.errors import ExportError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

GRAPH_FILE = "embedder.onnx"
QUANTIZED_FILE = "embedder.int8.onnx"
TOKENIZER_FILE = "tokenizer.json"
OPSET = 17
POOLINGS = ("mean", "cls")


def export_embedder(embedder: SentenceEmbedder, directory: Path) -> None:
    """Write the embedder's graph and its tokenizer.

    Args:
        embedder: of transformer, mean or first-token pooling and, if at all, normalisation.
        directory: for GRAPH_FILE and TOKENIZER_FILE.

    Raises:
        ExportError: another kind of model, or one that torch cannot trace.
    """
    import torch

    model = embedder.model
    pooling = _pooling(model)
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        raise ExportError("its tokenizer is not of the tokenizers library")
    transformer: Any = model[0]
    transformer = transformer.auto_model
    ids = torch.ones(2, 5, dtype=torch.long, device=model.device)
    axes = {0: "texts", 1: "tokens"}
    try:
        with _traceable(transformer), _quiet(), torch.no_grad():
            torch.onnx.export(
                _graph(transformer, pooling),
                (ids, torch.ones_like(ids)),
                str(directory / GRAPH_FILE),
                input_names=["ids", "mask"],
                output_names=["vectors"],
                dynamic_axes={"ids": axes, "mask": axes, "vectors": {0: "texts"}},
                opset_version=OPSET,
                dynamo=False,
            )
            _fuse(directory / GRAPH_FILE, transformer.config)
    except Exception as error:  # torch and ONNX raise whatever they meet
        raise ExportError(f"it cannot be exported ({_first_line(error)})") from error
    (directory / TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8")


def _pooling(model: SentenceTransformer) -> str:
    names = [type(module).__name__ for module in model]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise ExportError(f"it is made of {', '.join(names)}")
    if model.prompts.get(model.default_prompt_name or ""):
        raise ExportError("it puts a prompt before each text")
    pooling = str(getattr(model[1], "pooling_mode", ""))
    if pooling not in POOLINGS:
        raise ExportError(f"it pools by '{pooling}'")
    return pooling


def _graph(transformer: Any, pooling: str) -> Any:
    import torch

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, ids: Any, mask: Any) -> Any:
            hidden_BTD = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
            if pooling == "cls":
                pooled_BD = hidden_BTD[:, 0]
            else:
                mask_BT1 = mask.unsqueeze(-1).to(hidden_BTD.dtype)
                pooled_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(pooled_BD, dim=-1)

    return Graph().eval()


def _fuse(graph: Path, config: Any) -> None:
    """Fuse attention and normalisation in place; graphs it does not know stay as they are.

    On one core that makes the difference of 2.9 to 1.6 ms a query, and changes no route.
    """
    if getattr(config, "model_type", "") not in ("bert", "roberta", "xlm-roberta"):
        return
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("bert")
    options.enable_skip_layer_norm = options.enable_bias_skip_layer_norm = False  # see SLOWER
    fused = optimizer.optimize_model(
        str(graph),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
        only_onnxruntime=False,
        optimization_options=options,
    )
    fused.save_model_to_file(str(graph))


@contextmanager
def _traceable(transformer: Any) -> Iterator[None]:
    """Attention spelled out: the fused kind is traced for one length only."""
    before = transformer.config._attn_implementation
    transformer.set_attn_implementation("eager")
    try:
        yield
    finally:
        transformer.set_attn_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the advice of tracing and fusing, which is not for users, off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
