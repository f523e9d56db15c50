"""Products in 8 bits: close to those of 32, and nothing else of a graph is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from router.quantization import quantize
from router.tokens import FUSED, session_of

HEADS = 4
Arrays = dict[str, npt.NDArray[Any]]


def model(nodes: list[Any], arrays: Arrays, width: int) -> ModelProto:
    shape = ["B", "T", None]
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", width]),
            helper.make_tensor_value_info("mask", TensorProto.INT32, ["B", "T"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(FUSED, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def product(width: int, outward: int, rng: np.random.Generator) -> ModelProto:
    weight = rng.standard_normal((width, outward), dtype=np.float32)
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, width)


def inputs(width: int, rng: np.random.Generator, *, loud: int = 0) -> Arrays:
    x = rng.standard_normal((1, 9, width), dtype=np.float32)
    x[..., :loud] *= 60
    return {"x": x, "mask": np.ones((1, 9), dtype=np.int32)}


def kinds(graph: ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


def off(graph: ModelProto, made: ModelProto, given: Arrays) -> float:
    """Root mean square of the difference, as a share of what is right."""
    (right,), (found,) = (session_of(m.SerializeToString()).run(None, given) for m in (graph, made))
    return float(np.sqrt(np.mean((right - found) ** 2) / np.mean(right**2)))


@settings(max_examples=15, deadline=None)
@given(
    blocks=st.integers(1, 12),
    block=st.sampled_from([16, 32, 64, 128]),
    outward=st.integers(1, 70),
    loud=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_product_is_nearly_the_same_even_with_loud_channels(
    blocks: int, block: int, outward: int, loud: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    width = blocks * block
    graph = product(width, outward, rng)
    made = quantize(graph, [inputs(width, rng, loud=loud) for _ in range(3)])
    assert kinds(made) == ["Mul", "MatMulNBits"]
    assert off(graph, made, inputs(width, rng, loud=loud)) < 0.02
    assert made.ByteSize() < graph.ByteSize() or outward * width < 4000


def test_loud_channels_are_shifted_to_the_weights() -> None:
    rng = np.random.default_rng(0)
    graph = product(256, 64, rng)
    seen, other = inputs(256, rng, loud=4), inputs(256, rng, loud=4)
    blind = {**seen, "x": np.ones_like(seen["x"])}
    assert off(graph, quantize(graph, [seen]), other) < 0.7 * off(
        graph, quantize(graph, [blind]), other
    )


def test_what_no_block_divides_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    graph = product(24, 8, rng)
    assert quantize(graph, [inputs(24, rng)]).SerializeToString() == graph.SerializeToString()


def test_a_product_of_two_tensors_is_none_of_ours() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["s"]),
        helper.make_node("MatMul", ["s", "x"], ["m"]),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    graph = model(nodes, {"w": rng.standard_normal((64, 32), dtype=np.float32)}, 64)
    made = quantize(graph, [inputs(64, rng)])
    assert kinds(made) == ["Transpose", "MatMul", "MatMul", "Mul", "MatMulNBits"]


@pytest.mark.parametrize("hidden", [0, 4])
def test_attention_keeps_its_mask_its_heads_and_its_bias(hidden: int) -> None:
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "w": rng.standard_normal((64, 192), dtype=np.float32) / 8,
        "b": rng.standard_normal(192, dtype=np.float32),
    }
    node = helper.make_node(
        "Attention", ["x", "w", "b", "mask"], ["y"], domain=FUSED, num_heads=HEADS
    )
    graph = model([node], arrays, 64)
    given = inputs(64, rng)
    made = quantize(graph, [given])
    assert kinds(made) == ["Mul", "MatMulNBits", "Split", "MultiHeadAttention"]
    given["mask"][:, 9 - hidden :] = 0
    assert off(graph, made, given) < 0.02


def test_attention_with_more_than_is_known_stays() -> None:
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "w": rng.standard_normal((64, 192), dtype=np.float32),
        "b": np.zeros(192, dtype=np.float32),
    }
    node = helper.make_node(
        "Attention",
        ["x", "w", "b", "mask"],
        ["y"],
        domain=FUSED,
        num_heads=HEADS,
        unidirectional=1,
    )
    assert kinds(quantize(model([node], arrays, 64), [inputs(64, rng)])) == ["Attention"]
