"""The encoder's arrays as a graph that ONNX Runtime computes, several times as fast as numpy.

The graph is made when a router is loaded, so that a bundle holds arrays and nothing else. Attention
is the fused kind of ONNX Runtime. Knows nothing of texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from router.tokens import FUSED

if TYPE_CHECKING:
    from onnx import ModelProto

Arrays = Mapping[str, npt.NDArray[Any]]

OPSET = 17
EPSILON = 1e-12
"""Added to a variance before its root, as BERT has it."""
WORDS = "words"
ENTRY = ("positions", "entry_scale", "entry_shift")
LAYER = (
    "inward",
    "inward_bias",
    "outward",
    "outward_bias",
    "attention_scale",
    "attention_shift",
    "wide",
    "wide_bias",
    "narrow",
    "narrow_bias",
    "layer_scale",
    "layer_shift",
)
"""Of a layer, in the order in which they are used: queries, keys and values in one product; the
heads' output; a norm; the feed-forward layer's two products; a norm."""
HEAD = ("head", "head_bias")


def layer_array(layer: int, name: str) -> str:
    """Name of an array of a layer."""
    return f"{layer}.{name}"


def whole(arrays: Arrays, layers: int, heads: int, clusters: int) -> bool:
    """Whether the arrays are all there, of shapes that fit each other, and finite.

    Raises:
        KeyError: one is missing.
    """
    words, positions = arrays[WORDS], arrays[ENTRY[0]]
    if words.ndim != 2 or positions.ndim != 2 or layers < 1 or heads < 1 or not words.size:
        return False
    width = words.shape[1]
    first = arrays[layer_array(0, "wide")]
    wide = first.shape[-1] if first.ndim else 0
    shapes = {ENTRY[0]: (len(positions), width), ENTRY[1]: (width,), ENTRY[2]: (width,)}
    shapes |= {HEAD[0]: (width, clusters), HEAD[1]: (clusters,)}
    of_layer: dict[str, tuple[int, ...]] = dict.fromkeys(LAYER, (width,)) | {
        "inward": (width, 3 * width),
        "inward_bias": (3 * width,),
        "outward": (width, width),
        "wide": (width, wide),
        "wide_bias": (wide,),
        "narrow": (wide, width),
    }
    for layer in range(layers):
        shapes |= {layer_array(layer, name): shape for name, shape in of_layer.items()}
    return (
        len(positions) > 0
        and width % heads == 0
        and all(
            arrays[name].shape == shape and bool(np.isfinite(arrays[name]).all())
            for name, shape in shapes.items()
        )
    )


def graph_of(arrays: Arrays, layers: int, heads: int) -> ModelProto:
    """The graph of the logits of texts, shape (B, K).

    Its inputs are `ids` and `mask`, of shape (B, T), and `places`, which counts to T.

    Args:
        arrays: that are `whole`.
        layers: how many.
        heads: of the attention.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    kept: dict[str, npt.NDArray[Any]] = {
        name: array if name == WORDS else np.asarray(array, dtype=np.float32)
        for name, array in arrays.items()
    }
    kept["axis"] = np.array([1], dtype=np.int64)
    kept["last"] = np.array([2], dtype=np.int64)

    def add(kind: str, inputs: list[str], output: str, *, fused: bool = False, **how: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], domain=FUSED if fused else "", **how))
        return output

    def normed(found: str, onto: str, bias: str, scale: str, shift: str) -> str:
        add("Add", [found, bias], f"{scale}.biased")
        add("Add", [f"{scale}.biased", onto], f"{scale}.onto")
        inputs = [f"{scale}.onto", scale, shift]
        return add("LayerNormalization", inputs, f"{scale}.done", axis=-1, epsilon=EPSILON)

    add("Gather", [WORDS, "ids"], "found")
    add("Cast", ["found"], "meant", to=TensorProto.FLOAT)
    add("Gather", [ENTRY[0], "places"], "placed")
    add("Add", ["meant", "placed"], "sum")
    hidden = add("LayerNormalization", ["sum", *ENTRY[1:]], "entry", axis=-1, epsilon=EPSILON)
    for layer in range(layers):
        n = {name: layer_array(layer, name) for name in LAYER}
        inputs = [hidden, n["inward"], n["inward_bias"], "mask"]
        seen = add("Attention", inputs, f"{layer}.seen", fused=True, num_heads=heads)
        out = add("MatMul", [seen, n["outward"]], f"{layer}.out")
        scale, shift = n["attention_scale"], n["attention_shift"]
        hidden = normed(out, hidden, n["outward_bias"], scale, shift)
        wide = add("MatMul", [hidden, n["wide"]], f"{layer}.widened")
        wide = add("BiasGelu", [wide, n["wide_bias"]], f"{layer}.bent", fused=True)
        out = add("MatMul", [wide, n["narrow"]], f"{layer}.narrowed")
        hidden = normed(out, hidden, n["narrow_bias"], n["layer_scale"], n["layer_shift"])
    add("Cast", ["mask"], "known", to=TensorProto.FLOAT)
    add("Unsqueeze", ["known", "last"], "weights")
    add("Mul", [hidden, "weights"], "weighted")
    add("ReduceSum", ["weighted", "axis"], "total", keepdims=0)
    add("ReduceSum", ["weights", "axis"], "count", keepdims=0)
    add("Div", ["total", "count"], "pooled")
    add("Gemm", ["pooled", *HEAD], "logits")
    graph = helper.make_graph(
        nodes,
        "encoder",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "T"]),
            helper.make_tensor_value_info("mask", TensorProto.INT32, ["B", "T"]),
            helper.make_tensor_value_info("places", TensorProto.INT64, ["T"]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "K"])],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in kept.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(FUSED, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
