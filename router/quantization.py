"""Products of a graph in 8 bits, so that a query takes about half the time on one core.

Weights and activations are rounded by blocks, each with a scale of its own. What is large in a
few channels of the activations is first shifted to the weights, which bear it better (SmoothQuant,
arXiv 2211.10438), by what the channels hold for a few texts. Knows nothing of what a graph
computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from router.tokens import FUSED, session_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Floats = npt.NDArray[np.float32]

BLOCKS = (128, 64, 32, 16)
"""Inputs of a product that share a scale: the largest that divides them."""
SHIFTED = 0.5
"""Power to which a channel's size is shifted to the weights."""
LEVELS = 127
INT8_PRODUCTS = 4
"""ONNX Runtime's name for products in 8 bits on both sides, sums in 32."""
LEAST = 1e-5
"""A channel of less counts as this much."""
SAMPLES = (
    "How do I reverse a list in Python without copying it?",
    "what's the weather going to be like in lisbon tomorrow",
    "please move two hundred dollars from checking to savings",
    "why was my card declined at the petrol station",
    "Translate 'good evening' into Italian.",
    "remind me to call the dentist on thursday at nine",
    "is it safe to take ibuprofen together with antibiotics?",
    "The tenant shall give the landlord written notice of any defect within fourteen days.",
    "The appeal was dismissed because it had been filed after the deadline.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "SELECT name, count(*) FROM orders GROUP BY name HAVING count(*) > 3;",
    "def mean(values):\n    return sum(values) / len(values)",
    "TypeError: 'NoneType' object is not subscriptable",
    "Beat the eggs with the sugar until pale, then fold in the flour and bake for thirty minutes.",
    "The midfielder scored twice in the second half and was later named player of the match.",
    "Shares of the carmaker fell by six percent after it lowered its forecast for the year.",
    "The cathedral was begun in the twelfth century and finished some two hundred years later.",
    "Ich möchte meine Buchung für Samstag stornieren.",
    "¿Dónde puedo cambiar la contraseña de mi cuenta?",
    "The patient reports chest pain that began three days ago and worsens with exercise.",
    "Let f be continuous on the closed interval; then it attains its maximum there.",
    "yes",
    "2024-03-17 08:41:12 WARN worker 3: no heartbeat for 30 s, restarting",
    "Sehr geehrte Damen und Herren, anbei finden Sie die Rechnung Nr. 4711 über 312,50 €.",
    "Stars much heavier than the sun burn their hydrogen within a few million years, swell, and "
    "end in an explosion that outshines their galaxy for weeks. What is left is a neutron star "
    "or, if the core was heavy enough, a black hole from which not even light escapes.",
    "Thank you for your order! It has left our warehouse and should reach you within three working "
    "days. If anything is missing or damaged, reply to this message with a picture of the parcel "
    "and we will send a replacement at once, free of charge, to the address on your account.",
)
"""Texts of several kinds to see the channels' sizes with."""


def quantize(graph: ModelProto, given: Iterable[Mapping[str, npt.NDArray[Any]]]) -> ModelProto:
    """The same graph with its products by constant matrices in 8 bits.

    Products whose inputs no block divides stay as they are, and so do all other operators. In a
    batch the rounding of a text depends on its company; compute one text at a time.

    Args:
        graph: of 32 bits; its fused attention, if any, has queries, keys and values in one matrix.
        given: inputs of the graph, as it takes them, for a few texts.
    """
    from onnx import ModelProto, numpy_helper

    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.graph.initializer
        if len(tensor.dims) == 2
    }
    products = [node for node in graph.graph.node if _block_of(node, weights)]
    if not products:
        return graph
    sizes = _sizes(graph, sorted({node.input[0] for node in products}), given)
    made = {node.output[0]: _Products(node, weights[node.input[1]]) for node in products}
    result = ModelProto()
    result.CopyFrom(graph)
    del result.graph.node[:], result.graph.initializer[:]
    for node in graph.graph.node:
        replaced = made.get(node.output[0])
        if replaced is None:
            result.graph.node.append(node)
            continue
        result.graph.node.extend(replaced.nodes())
        result.graph.initializer.extend(
            numpy_helper.from_array(array, name)
            for name, array in replaced.arrays(sizes[node.input[0]])
        )
    used = {name for node in result.graph.node for name in node.input}
    result.graph.initializer.extend(
        tensor for tensor in graph.graph.initializer if tensor.name in used
    )
    return result


class _Products:
    """What takes the place of one product, or of an attention with the product in it."""

    def __init__(self, node: NodeProto, weight: npt.NDArray[Any]) -> None:
        self._node = node
        self._weight = np.asarray(weight, dtype=np.float32)
        self._block = _block(len(weight))
        self._name = node.output[0]

    def nodes(self) -> Iterator[NodeProto]:
        from onnx import helper

        name, (inward, outward) = self._name, self._weight.shape
        attention = self._node.op_type == "Attention"
        product = f"{name}.product" if attention else name
        yield helper.make_node("Mul", [self._node.input[0], f"{name}.shrink"], [f"{name}.shrunk"])
        yield helper.make_node(
            "MatMulNBits",
            [f"{name}.shrunk", f"{name}.levels", f"{name}.scales"],
            [product],
            domain=FUSED,
            K=inward,
            N=outward,
            bits=8,
            block_size=self._block,
            accuracy_level=INT8_PRODUCTS,
        )
        if not attention:
            return
        parts = [f"{name}.{part}" for part in ("queries", "keys", "values")]
        yield helper.make_node("Split", [product], parts, axis=-1)
        rest = [*self._node.input[2:4]]
        joined = helper.make_node("MultiHeadAttention", parts + rest, [name], domain=FUSED)
        joined.attribute.extend(self._node.attribute)
        yield joined

    def arrays(self, sizes: Floats) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """By the largest absolute value of each of the product's inputs, shape (K,)."""
        largest = np.abs(self._weight).max(axis=1)
        shift = np.maximum(sizes, LEAST) ** SHIFTED / np.maximum(largest, LEAST) ** (1 - SHIFTED)
        shifted = self._weight * shift[:, None]
        blocks = shifted.T.reshape(self._weight.shape[1], -1, self._block)
        scales = np.maximum(np.abs(blocks).max(axis=2) / LEVELS, np.finfo(np.float32).tiny)
        levels = np.rint(blocks / scales[:, :, None]) + LEVELS + 1
        yield f"{self._name}.shrink", (1 / shift).astype(np.float32)
        yield f"{self._name}.levels", levels.astype(np.uint8)
        yield f"{self._name}.scales", scales.astype(np.float32).reshape(-1)


def _block_of(node: NodeProto, weights: Mapping[str, npt.NDArray[Any]]) -> int:
    """Inputs to a block where a node is a product that can be replaced, else 0."""
    if node.op_type not in ("MatMul", "Attention") or node.input[1] not in weights:
        return 0
    if node.op_type == "Attention":
        known = {"num_heads", "mask_filter_value", "scale"}
        if len(node.input) > 4 or not {each.name for each in node.attribute} <= known:
            return 0
    return _block(len(weights[node.input[1]]))


def _block(inputs: int) -> int:
    return next((size for size in BLOCKS if inputs % size == 0), 0)


def _sizes(
    graph: ModelProto, names: list[str], given: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> dict[str, Floats]:
    """The largest absolute value of each channel of some tensors, shape (K,) each."""
    from onnx import ModelProto, TensorProto, helper

    shown = ModelProto()
    shown.CopyFrom(graph)
    shown.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    session = session_of(shown.SerializeToString())
    sizes: dict[str, Floats] = {}
    for inputs in given:
        for name, values in zip(names, session.run(names, dict(inputs)), strict=True):
            found = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
            sizes[name] = np.maximum(sizes.get(name, found), found)
    return sizes
