"""Products in 8 bits: close to those of 32, and nothing else of a graph is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from router.quantization import LEVELS, SAFE_LEVELS, levels_here, quantize
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
    width=st.integers(16, 600),
    outward=st.integers(1, 70),
    loud=st.integers(0, 3),
    by_token=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_product_is_nearly_the_same_even_with_loud_channels(
    width: int, outward: int, loud: int, seed: int, *, by_token: bool
) -> None:
    rng = np.random.default_rng(seed)
    graph = product(width, outward, rng)
    seen = [inputs(width, rng, loud=loud) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.quantization.SPREAD", 0 if by_token else np.inf)
        made = quantize(graph, seen)
    scaled, unscaled = (["Abs", "ReduceMax", "Max", "Div"], ["Mul"]) if by_token else ([], [])
    static = ["QuantizeLinear", "MatMulIntegerToFloat"]
    assert kinds(made) == ["Mul"] * bool(loud) + scaled + static + unscaled
    assert off(graph, made, seen[0]) < 0.03
    assert made.ByteSize() < graph.ByteSize() or outward * width < 4000


def test_loud_channels_are_shifted_to_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    graph = product(256, 64, rng)
    given = inputs(256, rng, loud=4)
    shifted = off(graph, quantize(graph, [given]), given)
    monkeypatch.setattr("router.quantization.UNEVEN", np.inf)
    assert shifted < 0.5 * off(graph, quantize(graph, [given]), given)


@pytest.mark.parametrize("biased", [False, True])
def test_what_hardly_goes_below_nought_has_a_scale_by_token(
    monkeypatch: pytest.MonkeyPatch, *, biased: bool
) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gelu", ["x"], ["bent"], domain=FUSED),
        helper.make_node("MatMul", ["bent", "w"], ["m" if biased else "y"]),
        *([helper.make_node("Add", ["m", "b"], ["y"])] if biased else []),
    ]
    arrays: Arrays = {"w": rng.standard_normal((96, 40), dtype=np.float32)}
    arrays |= {"b": rng.standard_normal(40, dtype=np.float32)} if biased else {}
    graph, given = model(nodes, arrays, 96), inputs(96, rng)
    given["x"][:, 4] *= 200  # one token is loud in all its channels
    made = quantize(graph, [given])
    assert "ReduceMax" in kinds(made)
    for loud in (1.0, 0.0, 30.0):
        other = {**given, "x": given["x"] * loud}
        quiet = [0, 1, 2, 3, 5, 6, 7, 8]
        right, found = (
            session_of(m.SerializeToString()).run(None, other)[0][:, quiet] for m in (graph, made)
        )
        assert np.abs(found - right).max() <= 0.03 * np.abs(right).max() + 1e-4, loud
    monkeypatch.setattr("router.quantization.ONE_SIDED", np.inf)
    monkeypatch.setattr("router.quantization.SPREAD", np.inf)
    plain = quantize(graph, [given])
    assert "ReduceMax" not in kinds(plain)
    (right,), (found,), (coarse,) = (
        session_of(m.SerializeToString()).run(None, given) for m in (graph, made, plain)
    )
    errors = [np.abs(each - right)[:, quiet].max() for each in (found, coarse)]
    assert errors[0] < 0.1 * errors[1]


def test_where_a_few_tokens_are_loud_each_has_a_scale_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    graph, given = product(96, 40, rng), inputs(96, rng)
    given["x"][:, 4] *= 200
    given["x"][:, 7] = 0
    monkeypatch.setattr("router.quantization.UNEVEN", np.inf)
    made = quantize(graph, [given])
    monkeypatch.setattr("router.quantization.SPREAD", np.inf)
    plain = quantize(graph, [given])
    assert "ReduceMax" in kinds(made)
    assert "ReduceMax" not in kinds(plain)
    (right,), (found,), (coarse,) = (
        session_of(m.SerializeToString()).run(None, given) for m in (graph, made, plain)
    )
    assert np.array_equal(found[:, 7], right[:, 7]), "a token of nothing but noughts"
    errors = [np.abs(each - right)[:, [0, 1, 2, 3, 5, 6, 8]].max() for each in (found, coarse)]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("bends", [False, True])
def test_a_constant_that_is_added_becomes_part_of_the_product(*, bends: bool) -> None:
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "w": rng.standard_normal((64, 32), dtype=np.float32),
        "b": rng.standard_normal(32, dtype=np.float32),
    }
    add = "BiasGelu" if bends else "Add"
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node(add, ["m", "b"], ["y"], domain=FUSED if bends else ""),
    ]
    graph, given = model(nodes, arrays, 64), inputs(64, rng)
    made = quantize(graph, [given])
    assert kinds(made) == ["QuantizeLinear", "MatMulIntegerToFloat"] + ["Gelu"] * bends
    assert off(graph, made, given) < 0.02


def test_a_product_that_more_than_the_sum_uses_keeps_the_sum_apart() -> None:
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "w": rng.standard_normal((32, 32), dtype=np.float32),
        "b": rng.standard_normal(32, dtype=np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["n"]),
        helper.make_node("Mul", ["m", "n"], ["y"]),
    ]
    graph, given = model(nodes, arrays, 32), inputs(32, rng)
    made = quantize(graph, [given])
    assert kinds(made) == ["QuantizeLinear", "MatMulIntegerToFloat", "Add", "Mul"]
    assert off(graph, made, given) < 0.04


def test_a_batch_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    graph, given = product(64, 48, rng), inputs(64, rng)
    session = session_of(quantize(graph, [given]).SerializeToString())
    many = rng.standard_normal((5, 9, 64), dtype=np.float32)
    mask = np.ones((5, 9), dtype=np.int32)
    (together,) = session.run(None, {"x": many, "mask": mask})
    for row, x in enumerate(many):
        (alone,) = session.run(None, {"x": x[None], "mask": mask[:1]})
        assert np.array_equal(alone[0], together[row])


def test_fewer_levels_are_kept_to() -> None:
    rng = np.random.default_rng(0)
    graph, given = product(64, 48, rng), inputs(64, rng)
    for levels in (SAFE_LEVELS, LEVELS):
        made = quantize(graph, [given], levels)
        (weights,) = (
            numpy_helper.to_array(tensor)
            for tensor in made.graph.initializer
            if tensor.data_type == TensorProto.INT8
        )
        assert np.abs(weights.astype(int)).max() == levels
        assert off(graph, made, given) < 0.03


def test_a_processor_that_loses_sums_gets_fewer_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.quantization._exact_here", lambda: False)
    assert levels_here() == SAFE_LEVELS
    monkeypatch.setattr("router.quantization._exact_here", lambda: True)
    assert levels_here() == LEVELS


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
    assert kinds(made) == [
        "Transpose",
        "MatMul",
        "MatMul",
        "QuantizeLinear",
        "MatMulIntegerToFloat",
    ]


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
    whole = ["QuantizeLinear", "MatMulIntegerToFloat"]
    assert kinds(made) == [*whole, "Split", "MultiHeadAttention"]
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
