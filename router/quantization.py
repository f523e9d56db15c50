"""Products of a graph in 8 bits, so that a query takes about a third of the time on one core.

Weights are rounded by column, activations by a scale that a few texts have shown to suffice. Where
a few channels of the activations are much larger than the others, their size is first shifted to
the weights, which bear it better (SmoothQuant, arXiv 2211.10438); where a few tokens are, each has
a scale of its own. So the sums are those of whole numbers, and a text's rounding does not depend on
its company. Knows nothing of what a graph computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from router.tokens import FUSED, session_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

ROUNDING = 1
"""Number of this way to round: what one did to routes says nothing of another."""
LEVELS = 127
"""Of a weight, above nought and below."""
SAFE_LEVELS = 63
"""Where a processor adds two products in 16 bits, as x86 without VNNI does."""
STEPS = 255
"""Of an activation."""
UNEVEN = 3.5
"""Channels whose largest is so many times the median one have their sizes shifted: that takes an
operator more, and divides the error by two to twelve."""
SHIFTED = 0.65
"""Power to which a channel's size is shifted to the weights."""
SPREAD = 2.2
"""Tokens whose largest value is so many times the median one's have scales of their own: that takes
four operators more, and divides the error by 1.5 to three."""
ONE_SIDED = 6
"""Activations whose largest value is so many times their least one's size, as GELU's, hardly go
below nought; a few tokens of theirs are large in any text."""
BELOW = 32
"""Steps of these that are below nought."""
LEAST = 1e-5
"""What is less counts as this much."""
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


def levels_here() -> int:
    """LEVELS where this machine's products of 8 bits are exact up to them, else SAFE_LEVELS."""
    return LEVELS if _exact_here() else SAFE_LEVELS


def quantize(
    graph: ModelProto, given: Iterable[Mapping[str, Array]], levels: int = LEVELS
) -> ModelProto:
    """The same graph with its products by constant matrices in 8 bits.

    All other operators stay as they are, but that a constant which is added to such a product may
    become a part of it.

    Args:
        graph: of 32 bits; its fused attention, if any, has queries, keys and values in one matrix.
        given: inputs of the graph, as it takes them, for a few texts.
        levels: of a weight, above nought and below.
    """
    from onnx import ModelProto, numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    products = {n.output[0]: n for n in graph.graph.node if _replaceable(n, constants)}
    if not products:
        return graph
    seen = _seen(graph, sorted({node.input[0] for node in products.values()}), given)
    adders = _adders(graph, products, constants)
    absorbed: set[str] = set()
    made = _Parts()
    for node in graph.graph.node:
        name = node.output[0]
        if name in absorbed:
            continue
        if name not in products:
            made.nodes.append(node)
            continue
        rounding = _rounding(seen[node.input[0]], constants[node.input[1]], levels)
        adder = None if rounding.by_token else adders.get(name)
        if adder is not None:
            absorbed.add(adder.output[0])
        _replace(made, node, rounding, adder)
    result = ModelProto()
    result.CopyFrom(graph)
    del result.graph.node[:], result.graph.initializer[:]
    result.graph.node.extend(made.nodes)
    used = {name for node in made.nodes for name in node.input}
    result.graph.initializer.extend(
        tensor for tensor in graph.graph.initializer if tensor.name in used
    )
    result.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in made.arrays.items()
    )
    return result


@dataclass(frozen=True, slots=True)
class _Rounding:
    """How the inputs of a product, shape (T, K), and its weights, shape (K, N), are rounded."""

    shrink: Floats | None
    """What each channel is multiplied by before, shape (K,); none: by nothing."""
    by_token: bool
    one_sided: bool
    """Whether a token's largest value counts, not its largest size."""
    step: float
    """From a whole number to the next; by token, as a share of the token's largest value."""
    nought: int
    """Whole number that stands for 0."""
    least: float
    """By token, what the largest value counts for at the least."""
    weights: npt.NDArray[np.int8]
    """Shape (K, N)."""
    scales: Floats
    """Of the weights' columns, shape (N,)."""


def _rounding(seen_TK: Floats, weight_KN: Array, levels: int) -> _Rounding:
    """By what a few texts have shown of a product's inputs."""
    weight, shrink = np.asarray(weight_KN, dtype=np.float32), None
    one_sided = bool(seen_TK.max() >= -ONE_SIDED * seen_TK.min())
    channels = np.maximum(np.abs(seen_TK).max(axis=0), LEAST)
    if not one_sided and channels.max() > UNEVEN * np.median(channels):
        largest = np.maximum(np.abs(weight).max(axis=1), LEAST)
        shift = channels**SHIFTED / largest ** (1 - SHIFTED)
        shrink, weight = (1 / shift).astype(np.float32), weight * shift[:, None]
        seen_TK = seen_TK * shrink
    tokens = np.abs(seen_TK).max(axis=1)
    by_token = one_sided or bool(tokens.max() > SPREAD * np.median(tokens))
    lowest = min(0.0, float(seen_TK.min()))
    highest = max(LEAST, float(seen_TK.max()))
    least = LEAST
    if by_token:
        nought = BELOW if one_sided else (STEPS + 1) // 2
        step = 1 / (STEPS - nought)
        if one_sided:
            least = max(LEAST, -lowest / (BELOW * step))
    else:
        step = (highest - lowest) / STEPS
        nought = round(-lowest / step)
    scales = np.maximum(np.abs(weight).max(axis=0) / levels, np.finfo(np.float32).tiny)
    weights = np.rint(weight / scales).astype(np.int8)
    return _Rounding(
        shrink, by_token, one_sided, step, nought, least, weights, scales.astype(np.float32)
    )


class _Parts:
    """Nodes and constants of the graph that is made."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.arrays: dict[str, Array] = {}

    def add(self, kind: str, inputs: Iterable[str], *outputs: str, **how: Any) -> str:
        """Another operator, one of ONNX Runtime's own where `domain` says so."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), **how))
        return outputs[0]

    def constant(self, name: str, value: npt.ArrayLike, kind: type = np.float32) -> str:
        self.arrays[name] = np.asarray(value, dtype=kind)
        return name


def _replace(made: _Parts, node: NodeProto, rounding: _Rounding, adder: NodeProto | None) -> None:
    """Compute in whole numbers a product, an attention with one in it, or one with its `adder`."""
    name = node.output[0]
    if node.op_type == "Attention":
        output = _product(made, node, rounding, f"{name}.products", bias=node.input[2])
        parts = [f"{name}.{part}" for part in ("queries", "keys", "values")]
        made.add("Split", [output], *parts, axis=-1)
        made.add("MultiHeadAttention", [*parts, "", *node.input[3:4]], name, domain=FUSED)
        made.nodes[-1].attribute.extend(node.attribute)
    elif adder is None:
        _product(made, node, rounding, name)
    else:
        bias = next(each for each in adder.input if each != name)
        bends = adder.op_type == "BiasGelu"
        output = f"{name}.biased" if bends else adder.output[0]
        _product(made, node, rounding, output, bias=bias)
        if bends:
            made.add("Gelu", [output], adder.output[0], domain=FUSED)


def _product(
    made: _Parts, node: NodeProto, rounding: _Rounding, output: str, *, bias: str = ""
) -> str:
    name, inputs = node.output[0], node.input[0]

    def constant(what: str, value: npt.ArrayLike, kind: type = np.float32) -> str:
        return made.constant(f"{name}.{what}", value, kind)

    step, nought = constant("step", rounding.step), constant("nought", rounding.nought, np.uint8)
    weights = constant("weights", rounding.weights, np.int8)
    scales = constant("scales", rounding.scales)
    if rounding.shrink is not None:
        inputs = made.add("Mul", [inputs, constant("shrink", rounding.shrink)], f"{name}.shrunk")
    if not rounding.by_token:
        whole = made.add("QuantizeLinear", [inputs, step, nought], f"{name}.whole")
        factors = [whole, weights, step, scales, nought, *(("", bias) if bias else ())]
        return made.add("MatMulIntegerToFloat", factors, output, domain=FUSED)
    sizes = inputs if rounding.one_sided else made.add("Abs", [inputs], f"{name}.sizes")
    peak = made.add("ReduceMax", [sizes], f"{name}.peak", axes=[-1], keepdims=1)
    largest = made.add("Max", [peak, constant("least", rounding.least)], f"{name}.largest")
    shares = made.add("Div", [inputs, largest], f"{name}.shares")
    whole = made.add("QuantizeLinear", [shares, step, nought], f"{name}.whole")
    factors = [whole, weights, step, scales, nought]
    found = made.add("MatMulIntegerToFloat", factors, f"{name}.found", domain=FUSED)
    if not bias:
        return made.add("Mul", [found, largest], output)
    return made.add("Add", [made.add("Mul", [found, largest], f"{name}.unbiased"), bias], output)


def _replaceable(node: NodeProto, constants: Mapping[str, Array]) -> bool:
    """Whether a node is a product by a constant matrix, or an attention with one that is known."""
    if node.op_type not in ("MatMul", "Attention"):
        return False
    weight = constants.get(node.input[1])
    if weight is None or weight.ndim != 2:
        return False
    known = {"num_heads", "mask_filter_value", "scale"}
    return node.op_type == "MatMul" or (
        len(node.input) <= 4
        and node.input[2] in constants
        and {each.name for each in node.attribute} <= known
    )


def _adders(
    graph: ModelProto, products: Mapping[str, NodeProto], constants: Mapping[str, Array]
) -> dict[str, NodeProto]:
    """By a product's name, what adds a constant row to it, where that alone uses it."""
    users: dict[str, list[NodeProto]] = {name: [] for name in products}
    for node in graph.graph.node:
        for name in node.input:
            if name in users:
                users[name].append(node)
    shown = {output.name for output in graph.graph.output}
    found = {}
    for name, product in products.items():
        if len(users[name]) != 1 or name in shown or product.op_type == "Attention":
            continue
        (user,) = users[name]
        row = (constants[product.input[1]].shape[1],)
        others = [constants.get(each) for each in user.input if each != name]
        if user.op_type in ("Add", "BiasGelu") and any(
            other is not None and other.shape == row for other in others
        ):
            found[name] = user
    return found


def _seen(
    graph: ModelProto, names: list[str], given: Iterable[Mapping[str, Array]]
) -> dict[str, Floats]:
    """What some tensors hold, each of shape (T, K)."""
    from onnx import ModelProto, TensorProto, helper

    shown = ModelProto()
    shown.CopyFrom(graph)
    shown.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    session = session_of(shown.SerializeToString())
    runs = [session.run(names, dict(inputs)) for inputs in given]
    return {
        name: np.concatenate([values.reshape(-1, values.shape[-1]) for values in found])
        for name, found in zip(names, zip(*runs, strict=True), strict=True)
    }


@cache
def _exact_here() -> bool:
    """Whether this machine adds the largest products in 8 bits without loss."""
    from onnx import TensorProto, helper, numpy_helper

    made, width = _Parts(), 64
    made.constant("one", 1)
    made.constant("nought", 0, np.uint8)
    made.constant("weights", np.full((width, width), LEVELS), np.int8)
    factors = ["whole", "weights", "one", "one", "nought"]
    made.add("MatMulIntegerToFloat", factors, "sums", domain=FUSED)
    graph = helper.make_graph(
        made.nodes,
        "largest",
        [helper.make_tensor_value_info("whole", TensorProto.UINT8, ["T", width])],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, ["T", width])],
        [numpy_helper.from_array(array, name) for name, array in made.arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(FUSED, 1)]
    session = session_of(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    )
    (sums,) = session.run(None, {"whole": np.full((2, width), STEPS, dtype=np.uint8)})
    return bool((sums == width * STEPS * LEVELS).all())
