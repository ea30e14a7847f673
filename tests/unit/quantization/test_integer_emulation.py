"""Saturating sums against a loop over pairs, and the layers that ONNX Runtime computes in integers."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from support.int8 import optimised

from bnexport.quantization.integer_emulation import EXACT, SATURATING, Int8Layer, IntegerEmulator, int8_layers
from bnexport.tensors import Array


def pairs(inputs: Array, weights: Array) -> int:
    """Return the sum of products of which every two neighbours are added in 16 bits."""
    products = [*(inputs.astype(int) * weights.astype(int)).tolist(), 0]
    return sum(min(max(a + b, -32768), 32767) for a, b in zip(products[0::2], products[1::2], strict=False))


@pytest.mark.parametrize(
    ("channels", "groups", "pads", "settings"),
    [
        (3, 1, [(1, 1), (1, 1)], {"pads": [1, 1, 1, 1]}),
        (6, 2, [(0, 1), (2, 0)], {"strides": [2, 1], "pads": [0, 2, 1, 0]}),
        (4, 1, [(2, 2), (2, 2)], {"dilations": [2, 2], "auto_pad": "SAME_UPPER"}),
    ],
)
def test_each_pair_of_neighbours_saturates_alone(
    channels: int, groups: int, pads: list[tuple[int, int]], settings: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (4, channels // groups, 3, 3)).astype(np.int8)
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=groups, **settings)
    scales = rng.uniform(0.1, 1.0, 4)
    layer = Int8Layer(node, codes, scales, 0.5, 7, in_integers=True)
    inputs = rng.integers(0, 256, (2, channels, 6, 7))
    padded = np.pad(inputs, [(0, 0), (0, 0), *pads], constant_values=7)
    strides, spread = settings.get("strides", [1, 1]), settings.get("dilations", [1, 1])
    found = layer.lost((inputs - 7) * 0.5)
    for image, out, row, column in np.ndindex(found.shape):
        group = out // (4 // groups)
        part = padded[image, group * channels // groups : (group + 1) * channels // groups]
        part = part[:, row * strides[0] :: spread[0], column * strides[1] :: spread[1]][:, :3, :3]
        taps, weights = np.moveaxis(part, 0, -1).ravel(), np.moveaxis(codes[out], 0, -1).ravel()
        lost = pairs(taps, weights) - int(taps @ weights.astype(int))
        assert found[image, out, row, column] == pytest.approx(lost * 0.5 * scales[out])
    assert (found != 0).mean() > 0.1


def qdq(nodes: list[onnx.NodeProto], outputs: list[str], *, weight: Array, zero: Array, bias: str = "b") -> ModelProto:
    """Return a file with codes of the input "x" and the weight "w", a float and an int32 bias, and more operators."""
    rng = np.random.default_rng(0)
    decoded = [
        helper.make_node("QuantizeLinear", ["input", "step", "zero"], ["x_codes"]),
        helper.make_node("DequantizeLinear", ["x_codes", "step", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w_codes", "w_step", "w_zero"], ["w"]),
        helper.make_node("DequantizeLinear", ["b_codes", "b_step"], ["b"]),
    ]
    arrays = {
        "step": np.float32(0.02), "zero": zero, "w_step": np.float32(0.01), "w_zero": np.int8(0), "b_step": np.float32(0.0002),
        "w_codes": weight, "b_codes": rng.integers(-999, 999, 8).astype(np.int32),
        "float": rng.normal(size=8).astype(np.float32), "low": np.float32(0), "high": np.float32(6),
        "narrow": np.float32(1), "out_step": np.float32(0.02),
    }  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [*decoded, *nodes], "g", [value("input", TensorProto.FLOAT, [2, 4, 6, 6] if weight.ndim == 4 else [2, 4])],
        [value(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def coded(name: str, *, output: str = "y") -> list[onnx.NodeProto]:
    """Return the operators that round a tensor to codes."""
    return [
        helper.make_node("QuantizeLinear", [name, "out_step", "zero"], [f"{name}_codes"]),
        helper.make_node("DequantizeLinear", [f"{name}_codes", "out_step", "zero"], [output]),
    ]


def made(kind: str, inputs: list[str], output: str, **settings: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], **settings)


CONV, RELU = made("Conv", ["x", "w", "b"], "c"), made("Relu", ["c"], "r")
FORMS: dict[str, tuple[list[onnx.NodeProto], list[str]]] = {
    "rounded": ([CONV, *coded("c")], ["y"]),
    "rounded ReLU": ([CONV, RELU, *coded("r")], ["y"]),
    "rounded clamp": ([CONV, made("Clip", ["c", "low", "high"], "r"), *coded("r")], ["y"]),
    "clamp narrower than its codes": ([CONV, made("Clip", ["c", "low", "narrow"], "r"), *coded("r")], ["y"]),
    "rounded after pooling": ([CONV, made("MaxPool", ["c"], "m", kernel_shape=[2, 2]), *coded("m")], ["y"]),
    "float output": ([made("Conv", ["x", "w", "b"], "y")], ["y"]),
    "float average": ([CONV, made("GlobalAveragePool", ["c"], "y")], ["y"]),
    "read twice": ([CONV, *coded("c"), made("Sigmoid", ["c"], "s")], ["y", "s"]),
    "float bias": ([made("Conv", ["x", "w", "float"], "c"), RELU, *coded("r")], ["y"]),
    "float bias, rounded after pooling": (
        [made("Conv", ["x", "w", "float"], "c"), RELU, made("MaxPool", ["r"], "m", kernel_shape=[2, 2]), *coded("m")],
        ["y"],
    ),
    "no bias": ([made("Conv", ["x", "w"], "c"), *coded("c")], ["y"]),
    "float output, float bias": ([made("Conv", ["x", "w", "float"], "y")], ["y"]),
    "product": ([made("Gemm", ["x", "w", "b"], "y", transB=1)], ["y"]),
    "rounded product": ([made("Gemm", ["x", "w", "b"], "c", transB=1), *coded("c")], ["y"]),
    "product, float bias": ([made("Gemm", ["x", "w", "float"], "y", transB=1)], ["y"]),
    "product, float ReLU": ([made("Gemm", ["x", "w", "b"], "c", transB=1), RELU, made("Abs", ["r"], "y")], ["y"]),
    "matrix product": ([made("MatMul", ["x", "w"], "y")], ["y"]),
    "rounded matrix product": ([made("MatMul", ["x", "w"], "c"), *coded("c")], ["y"]),
}


@pytest.mark.parametrize("zero", [np.uint8(0), np.uint8(100), np.int8(-128), np.int8(0)], ids=lambda zero: f"{zero!r}")
@pytest.mark.parametrize("form", FORMS)
def test_the_layers_in_integers_are_those_of_onnx_runtime(form: str, zero: Array, tmp_path: Path) -> None:
    nodes, outputs = FORMS[form]
    kind = nodes[0].op_type
    shape = {"Conv": (8, 4, 3, 3), "Gemm": (8, 4), "MatMul": (4, 8)}[kind]
    weight = np.random.default_rng(1).integers(100, 128, shape).astype(np.int8)
    model = qdq(nodes, outputs, weight=weight, zero=zero)
    onnx.save(model, tmp_path / "m.onnx")
    left = optimised(tmp_path / "m.onnx")
    in_float = bool({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"} & set(left))
    (layer,) = int8_layers(model)
    assert layer.in_integers != in_float, left
    feeds = {"input": np.full((2, 4, 6, 6) if kind == "Conv" else (2, 4), 5.0, np.float32)}
    exact, saturated = (IntegerEmulator(model, way).evaluate(feeds) for way in (EXACT, SATURATING))
    if in_float:
        assert all((exact[name] == saturated[name]).all() for name in outputs)


def test_onnx_runtime_has_no_integer_kernel_for_transposed_convolutions(tmp_path: Path) -> None:
    nodes = [made("ConvTranspose", ["x", "w", "b"], "c"), *coded("c")]
    model = qdq(nodes, ["y"], weight=np.ones((4, 8, 3, 3), np.int8), zero=np.uint8(0))
    onnx.save(model, tmp_path / "m.onnx")
    assert optimised(tmp_path / "m.onnx")["ConvTranspose"] == 1


def test_a_long_chain_and_a_computed_zero_point_are_read() -> None:
    names = ["c", *(f"c{index}" for index in range(3000))]
    chain = [made("Transpose", [one], other) for one, other in itertools.pairwise(names)]
    stored = qdq([CONV, *chain, *coded(names[-1])], ["y"], weight=np.ones((8, 4, 3, 3), np.int8), zero=np.uint8(0))
    sums = made("Add", ["zero", "zero"], "sum")
    rounded = made("QuantizeLinear", ["r", "out_step", "sum"], "y")
    computed = qdq([CONV, RELU, sums, rounded], ["y"], weight=np.ones((8, 4, 3, 3), np.int8), zero=np.uint8(0))
    assert [layer.in_integers for model in (stored, computed) for layer in int8_layers(model)] == [True, False]
