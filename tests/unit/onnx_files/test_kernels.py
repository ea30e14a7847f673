"""bnexport's operators of the evaluator against onnx's reference implementation in float64, on random shapes."""

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bnexport.onnx_files import kernels
from bnexport.onnx_files.float64 import Float64Evaluator, wide_evaluator
from bnexport.onnx_files.operators import better_operators

RANKS = {1: (11,), 2: (9, 7), 3: (5, 6, 4)}


def model(operator: str, shapes: list[tuple[int, ...]], opset: int = 18, **attributes: Any) -> onnx.ModelProto:
    names = ["x", "w", "b", "m", "v"][: len(shapes)]
    values = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, s) for n, s in zip(names, shapes, strict=True)]
    result = helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)
    graph = helper.make_graph([helper.make_node(operator, names, ["y"], **attributes)], "g", values, [result])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def feeds_of(made: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        value.name: rng.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in made.graph.input
    }


def compare(made: onnx.ModelProto, want: np.ndarray | None = None) -> None:
    assert better_operators(made), "onnx's own operator would be compared with itself"
    feeds = feeds_of(made)
    expected: Any = next(iter(ReferenceEvaluator(made).run(None, feeds))) if want is None else want
    (found,) = wide_evaluator(made).run(None, feeds)
    assert found.shape == expected.shape
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


@pytest.fixture(params=["one block", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide rows and samples of these small inputs into blocks, as those of large inputs are."""
    if request.param == "small blocks":
        monkeypatch.setattr(kernels, "_ROOM", 64)
        monkeypatch.setattr(kernels, "_MOST_ROOM", 64)
        monkeypatch.setattr(kernels, "_CACHED", 16)


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"strides": 2, "pads": (1, 2)},
    {"dilations": 2, "pads": (3, 0), "strides": 3},
    {"auto_pad": "SAME_UPPER", "strides": 2},
    {"auto_pad": "SAME_LOWER", "dilations": 2},
    {"auto_pad": "VALID"},
]
TRANSPOSED = [{}, {"strides": 2, "pads": (1, 0)}, {"strides": 3, "dilations": 2, "output_padding": 1}]
STEP = {"step": np.array(0.125, np.float32), "zero": np.array(3, np.uint8)}
ELEMENT_WISE: dict[str, Callable[[float], float]] = {
    "Relu": lambda x: max(x, 0.0),
    "Erf": math.erf,
    "Sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


def attributes_of(rank: int, geometry: dict[str, Any]) -> dict[str, Any]:
    found = dict(geometry)
    for name in {"strides", "dilations", "output_padding"} & found.keys():
        found[name] = [found[name]] * rank
    if "pads" in found:
        found["pads"] = [found["pads"][0]] * rank + [found["pads"][1]] * rank
    return found


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(4, 6, 1), (4, 6, 2), (4, 4, 4), (3, 6, 3)])
@pytest.mark.parametrize("rank", RANKS)
def test_convolutions(rank: int, channels: int, outputs: int, groups: int, geometry: dict[str, Any]) -> None:
    size, attributes = RANKS[rank], attributes_of(rank, geometry)
    kernel = (3, 2, 1)[:rank]
    shapes = [(3, channels, *size), (outputs, channels // groups, *kernel), (outputs,)]
    compare(model("Conv", shapes, group=groups, **attributes))
    compare(model("Conv", shapes[:2], group=groups, **attributes))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("geometry", TRANSPOSED, ids=str)
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(4, 6, 1), (4, 6, 2), (4, 4, 4), (3, 6, 3)])
@pytest.mark.parametrize("rank", RANKS)
def test_transposed_convolutions(rank: int, channels: int, outputs: int, groups: int, geometry: dict[str, Any]) -> None:
    """onnx's reference implementation is wrong for groups, so torch is the judge here."""
    attributes = attributes_of(rank, geometry)
    shapes = [(3, channels, *RANKS[rank]), (channels, outputs // groups, *(3, 2, 2)[:rank]), (outputs,)]
    made = model("ConvTranspose", shapes, group=groups, **attributes)
    x, w, b = (torch.from_numpy(array) for array in feeds_of(made).values())
    call = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[rank - 1]
    options = {name: attributes.get(name, [default] * rank) for name, default in (("strides", 1), ("dilations", 1))}
    more = attributes.get("output_padding", [0] * rank)
    want = call(x, w, b, options["strides"], [0] * rank, more, groups, options["dilations"])
    begin = geometry.get("pads", (0, 0))[0]
    kept: Any = (..., *(slice(begin, None) for _ in range(rank)))
    want = want[kept]
    compare(made, want.numpy())


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("auto_pad", ["VALID", "SAME_UPPER", "SAME_LOWER"])
def test_pooling_with_padding_by_name(operator: str, auto_pad: str) -> None:
    """onnx's own operators are wrong for some of them."""
    made = model(operator, [(2, 3, 9, 8)], kernel_shape=[3, 2], strides=[2, 2], auto_pad=auto_pad)
    narrow = onnx.ModelProto()
    narrow.CopyFrom(made)
    for value in (*narrow.graph.input, *narrow.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    session = onnxruntime.InferenceSession(narrow.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = feeds_of(made)
    (want,) = session.run(None, {"x": feeds["x"].astype(np.float32)})
    (found,) = wide_evaluator(made).run(None, feeds)
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [9, 13, 15])
def test_batch_norms_of_every_operator_set(opset: int) -> None:
    made = model("BatchNormalization", [(2, 4, 3, 5), *[(4,)] * 4], opset, epsilon=1e-3)
    feeds = feeds_of(made)
    feeds["v"] **= 2
    s, b, m, v = (feeds[name].reshape(-1, 1, 1) for name in "wbmv")
    (found,) = wide_evaluator(made).run(None, feeds)
    np.testing.assert_allclose(found, (feeds["x"] - m) / np.sqrt(v + np.float32(1e-3)) * s + b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("operator", ELEMENT_WISE)
def test_element_wise_operators_do_not_round(operator: str) -> None:
    """onnx's Erf rounds to float32, 6e-8 of scale, although this evaluation has to be exact."""
    made = model(operator, [(40,)])
    (found,) = wide_evaluator(made).run(None, feeds_of(made))
    np.testing.assert_allclose(found, [ELEMENT_WISE[operator](x) for x in feeds_of(made)["x"]], rtol=1e-15)
    (extreme,) = wide_evaluator(made).run(None, {"x": np.array([-800.0, 800.0])})
    assert extreme.tolist() == {"Relu": [0.0, 800.0], "Erf": [-1.0, 1.0], "Sigmoid": [0.0, 1.0]}[operator]


def test_codes_of_a_single_number() -> None:
    """onnxruntime's quantizer gives codes to constants without axes, as the 6 of a hard swish."""
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("QuantizeLinear", ["s", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in STEP.items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (found,) = wide_evaluator(made).run(None, {"x": np.array(0.0)})
    assert found.shape == ()
    assert found == pytest.approx(0.5, abs=1e-7)


def chain(count: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Neg", [f"v{at}"], [f"v{at + 1}"]) for at in range(count)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("v0", f"v{count}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_values_are_freed_after_their_last_use() -> None:
    """Ten values of 8 MB in a row never need more than three at once."""
    evaluator = Float64Evaluator(chain(10), chunk=1 << 18)
    x = np.zeros((1 << 18, 4), np.float32)
    evaluator.evaluate({"v0": x[:2]})
    tracemalloc.start()
    try:
        evaluator.evaluate({"v0": x})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * x.size * 8


def test_the_source_is_not_changed_and_its_weights_are_replaced() -> None:
    node = helper.make_node("Add", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    weight = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    made = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [weight]))
    before = made.SerializeToString()
    assert wide_evaluator(made).run(None, {"x": np.zeros(2)})[0].tolist() == [1.0, 2.0]
    exact = np.array([0.1, 0.2])
    assert wide_evaluator(made, {"w": exact}).run(None, {"x": np.zeros(2)})[0].tolist() == exact.tolist()
    assert made.SerializeToString() == before
