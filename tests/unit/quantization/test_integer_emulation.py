"""Saturating sums against a loop over pairs, and the layers that ONNX Runtime computes in integers."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from support.int8 import optimised

from bnexport.environment import int8_instructions
from bnexport.quantization.int8_plan import QuantizationPlan
from bnexport.quantization.integer_emulation import EXACT, SATURATING, Int8Layer, IntegerEmulator, int8_layers
from bnexport.quantization.writer import as_qdq
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
    layer = Int8Layer(node, codes, scales, 0.5, 7, in_integers=True, unsigned=True)
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
        "narrow": np.float32(1), "out_step": np.float32(0.02), "axis": np.array([0]),
        "steps": np.full(8, 0.02, np.float32), "zeros": np.full(8, zero), "x_steps": np.full(4, 0.02, np.float32),
        "x_zeros": np.full(4, zero), "around": np.array([0, 0, 1, 2, 0, 0, 0, 1]),
    }  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [*decoded, *nodes], "g", [value("input", TensorProto.FLOAT, [2, 4, 6, 6] if weight.ndim == 4 else [2, 4])],
        [value(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def coded(name: str, *, output: str = "y", step: str = "out_step", zero: str = "zero") -> list[onnx.NodeProto]:
    """Return the operators that round a tensor to codes."""
    return [
        helper.make_node("QuantizeLinear", [name, step, zero], [f"{name}_codes"], axis=1),
        helper.make_node("DequantizeLinear", [f"{name}_codes", step, zero], [output], axis=1),
    ]


def made(kind: str, inputs: list[str], output: str, **settings: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], **settings)


PAD, PADDED = made("Pad", ["x", "around"], "p"), made("Conv", ["p", "w", "b"], "c", pads=[0, 1, 0, 0])
POOL = made("MaxPool", ["x"], "p", kernel_shape=[2, 2])
CONV, RELU = made("Conv", ["x", "w", "b"], "c"), made("Relu", ["c"], "r")
#: Forms whose input has no codes
_UNCODED = {
    "averaged input", "padded by reflection", "padded twice read", "padded with ones", "padded, automatic pads",
}  # fmt: skip
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
    "codes read twice": ([CONV, *coded("c"), made("Abs", ["y"], "a"), made("Neg", ["y"], "b2")], ["a", "b2"]),
    "codes also an output": ([CONV, *coded("c"), made("Abs", ["y"], "a")], ["y", "a"]),
    "codes pooled, read twice": (
        [
            CONV,
            made("MaxPool", ["c"], "m", kernel_shape=[2, 2]),
            *coded("m"),
            made("Abs", ["y"], "a"),
            made("Neg", ["y"], "n"),
        ],
        ["a", "n"],
    ),
    "input read twice": ([made("Abs", ["x"], "a"), CONV, *coded("c")], ["y", "a"]),
    "input also an output": ([CONV, *coded("c")], ["y", "x"]),
    "input decoded twice": (
        [
            made("DequantizeLinear", ["x_codes", "step", "zero"], "again"),
            made("Abs", ["again"], "a"),
            CONV,
            *coded("c"),
        ],
        ["y", "a"],
    ),
    "padded input": ([PAD, PADDED, *coded("c")], ["y"]),
    "padded input, read twice": ([PAD, made("Abs", ["x"], "a"), PADDED, *coded("c")], ["y", "a"]),
    "padded twice read": ([PAD, made("Abs", ["p"], "a"), PADDED, *coded("c")], ["y", "a"]),
    "padded with ones": ([made("Pad", ["x", "around", "narrow"], "p"), PADDED, *coded("c")], ["y"]),
    "padded by reflection": ([made("Pad", ["x", "around"], "p", mode="reflect"), PADDED, *coded("c")], ["y"]),
    "padded, no pads": ([PAD, made("Conv", ["p", "w", "b"], "c"), *coded("c")], ["y"]),
    "padded, automatic pads": (
        [PAD, made("Conv", ["p", "w", "b"], "c", auto_pad="SAME_UPPER"), *coded("c")],
        ["y"],
    ),
    "pooled and padded input": (
        [POOL, made("Pad", ["p", "around"], "q"), made("Conv", ["q", "w", "b"], "c"), *coded("c")],
        ["y"],
    ),
    "pooled input": ([POOL, made("Conv", ["p", "w", "b"], "c"), *coded("c")], ["y"]),
    "pooled input, read twice": (
        [POOL, made("Abs", ["p"], "a"), made("Conv", ["p", "w", "b"], "c"), *coded("c")],
        ["y", "a"],
    ),
    "pooled input, an output": ([POOL, made("Conv", ["p", "w", "b"], "c"), *coded("c")], ["y", "p"]),
    "averaged input": (
        [made("AveragePool", ["x"], "p", kernel_shape=[2, 2]), made("Conv", ["p", "w", "b"], "c"), *coded("c")],
        ["y"],
    ),
    "product of a moved input": (
        [
            made("Transpose", ["x"], "p", perm=[1, 0]),
            made("Transpose", ["p"], "t", perm=[1, 0]),
            made("Gemm", ["t", "w", "b"], "y", transB=1),
        ],
        ["y"],
    ),
    "product, input read twice": ([made("Abs", ["x"], "a"), made("Gemm", ["x", "w", "b"], "y", transB=1)], ["y", "a"]),
    "rounded product, input read twice": (
        [made("Abs", ["x"], "a"), made("Gemm", ["x", "w", "b"], "c", transB=1), *coded("c")],
        ["y", "a"],
    ),
    "rounded product, all read twice": (
        [made("Abs", ["x"], "a"), made("Gemm", ["x", "w", "b"], "c", transB=1), *coded("c"), made("Abs", ["y"], "d")],
        ["y", "a", "d"],
    ),
    "matrix product, input read twice": ([made("Abs", ["x"], "a"), made("MatMul", ["x", "w"], "y")], ["y", "a"]),
    "rounded matrix product, read twice": (
        [made("MatMul", ["x", "w"], "c"), *coded("c"), made("Abs", ["y"], "a")],
        ["y", "a"],
    ),
    "rounded ReLU, a scale per channel": ([CONV, RELU, *coded("r", step="steps", zero="zeros")], ["y"]),
    "input with a scale per channel": (
        [*coded("input", step="x_steps", zero="x_zeros", output="i"), made("Conv", ["i", "w", "b"], "c"), *coded("c")],
        ["y"],
    ),
    "matrix product and sum": ([made("MatMul", ["x", "w"], "m"), made("Add", ["m", "float"], "y")], ["y"]),
    "matrix product and rounded sum": (
        [made("MatMul", ["x", "w"], "m"), made("Add", ["m", "float"], "c"), *coded("c")],
        ["y"],
    ),
    "matrix product and other sum": ([made("MatMul", ["x", "w"], "m"), made("Add", ["m", "narrow"], "y")], ["y"]),
    "matrix product of three axes and sum": (
        [made("Unsqueeze", ["x", "axis"], "u"), made("MatMul", ["u", "w"], "m"), made("Add", ["m", "float"], "y")],
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
    shapes = {"Conv": (8, 4, 3, 3), "Gemm": (8, 4), "MatMul": (4, 8)}
    kind = next(node.op_type for node in nodes if node.op_type in shapes)
    shape = shapes[kind]
    weight = np.random.default_rng(1).integers(100, 128, shape).astype(np.int8)
    model = qdq(nodes, outputs, weight=weight, zero=zero)
    onnx.save(model, tmp_path / "m.onnx")
    left = optimised(tmp_path / "m.onnx")
    in_float = bool({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"} & set(left))
    layers = int8_layers(model)
    assert len(layers) == (form not in _UNCODED)
    assert any(layer.in_integers for layer in layers) != in_float, left
    feeds = {"input": np.full((2, 4, 6, 6) if kind == "Conv" else (2, 4), 5.0, np.float32)}
    exact, saturated = (IntegerEmulator(model, way).evaluate(feeds) for way in (EXACT, SATURATING))
    if in_float:
        assert all((exact[name] == saturated[name]).all() for name in outputs)


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "settings"),
    [
        (3, 8, 3, {"pads": [1, 1, 1, 1]}),
        (5, 17, 3, {"strides": [2, 1], "pads": [0, 2, 1, 0]}),
        (16, 32, 3, {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
        (22, 88, 1, {}),
        (12, 24, 3, {"group": 3}),
        (16, 16, 3, {"group": 8}),
        (16, 16, 3, {"group": 16}),
        (8, 16, 3, {"group": 8}),
        (16, 64, 5, {"group": 16}),
    ],
)
def test_the_kernels_of_this_machine_are_emulated(
    channels: int, outputs: int, kernel: int, settings: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, (outputs, channels // settings.get("group", 1), kernel, kernel)).astype(np.int8)
    step = np.float32(0.5 * weight[0].size ** 0.5)
    names = ["c", "x_step", "x_zero", "w", "w_step", "w_zero", "y_step", "y_zero"]
    values = [
        np.float32(0.01),
        np.uint8(100),
        weight,
        np.float32(0.01),
        np.int8(0),
        step * np.float32(0.1),
        np.uint8(128),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [made("QuantizeLinear", ["x", "x_step", "x_zero"], "c"), made("QLinearConv", names, "d", **settings),
         made("DequantizeLinear", ["d", "y_step", "y_zero"], "y")],
        "g", [value("x", TensorProto.FLOAT, [2, channels, 7, 8])], [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in zip(names[1:], values, strict=True)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x": rng.uniform(-1, 1.55, (2, channels, 7, 8)).astype(np.float32)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    way = SATURATING if "which saturates" in int8_instructions() else EXACT
    expected = IntegerEmulator(as_qdq(model), way).evaluate(feeds)["y"]
    off = np.abs(session.run(None, feeds)[0] - expected) / float(values[5])
    assert off.max() < 1.01  # one last bit
    assert (off > 0.5).mean() < 0.01
    exact, saturated = (IntegerEmulator(as_qdq(model), way).evaluate(feeds)["y"] for way in (EXACT, SATURATING))
    depthwise = settings.get("group") == outputs
    assert ((exact != saturated).mean() > 0.01) != depthwise


@pytest.mark.parametrize(("outputs", "depthwise"), [(8, True), (16, False)])
def test_a_grouped_convolution_with_more_outputs_than_inputs_is_not_exempt(outputs: int, *, depthwise: bool) -> None:
    weight = np.full((outputs, 1, 3, 3), 0.5, np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [made("Conv", ["x", "w"], "y", group=8)], "g", [value("x", TensorProto.FLOAT, [2, 8, 6, 6])],
        [value("y", TensorProto.FLOAT, [2, outputs, 4, 4])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (layer,) = QuantizationPlan(model).layers
    assert layer.depthwise == depthwise


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
