"""Float layers between codes: ONNX Runtime rounds their weights, and a guard prevents it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from support.int8 import PIXELS, exact_statistics, folded, images
from torch import nn

from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.quantization.file_proof import Int8File, findings
from bnexport.quantization.integer_emulation import IntegerEmulator, rounded_float_layers
from bnexport.quantization.moments import seen_in_module
from bnexport.quantization.quantize import Calibration, Int8Options, Int8Result, quantise
from bnexport.quantization.writer import guarded_model, is_guard


def made(kind: str, inputs: str, output: str, **settings: Any) -> NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **settings)


def coded(name: str, output: str, step: str = "step", **settings: Any) -> list[NodeProto]:
    return [
        made("QuantizeLinear", f"{name} {step} zero", f"{name}_codes", **settings),
        made("DequantizeLinear", f"{name}_codes {step} zero", output, **settings),
    ]


POOL = {"kernel_shape": [2, 2]}
CONV, RELU = made("Conv", "x w b", "c"), made("Relu", "c", "r")
#: Operators behind the codes "x" of the input -> whether the layer is rounded
FORMS: dict[str, tuple[list[NodeProto], bool]] = {
    "convolution": ([CONV, *coded("c", "y")], True),
    "ReLU": ([CONV, RELU, *coded("r", "y")], True),
    "ReLU and clamp": ([CONV, RELU, made("Clip", "r low high", "k"), *coded("k", "y")], True),
    "transposed": ([made("ConvTranspose", "x v b", "c"), RELU, *coded("r", "y")], True),
    "product": ([made("Reshape", "x flat", "f"), made("Gemm", "f m b", "c"), *coded("c", "y")], True),
    "flattened product": ([made("Flatten", "x", "f"), made("Gemm", "f m b", "c"), *coded("c", "y")], False),
    "no bias": ([made("Conv", "x w", "c"), *coded("c", "y")], True),
    "pooled before": ([made("MaxPool", "x", "p", **POOL), made("Conv", "p w b", "c"), *coded("c", "y")], True),
    "pooled after": ([CONV, RELU, made("MaxPool", "r", "p", **POOL), *coded("p", "y")], True),
    "Identity": ([CONV, made("Identity", "c", "i"), made("Relu", "i", "r"), *coded("r", "y")], True),
    "ReLU after pooling": ([CONV, made("MaxPool", "c", "p", **POOL), made("Relu", "p", "r"), *coded("r", "y")], False),
    "float output": ([made("Conv", "x w b", "y")], False),
    "averaged before": ([made("AveragePool", "x", "p", **POOL), made("Conv", "p w b", "c"), *coded("c", "y")], False),
    "averaged after": ([CONV, made("AveragePool", "c", "p", **POOL), *coded("p", "y")], False),
    "Sigmoid": ([CONV, made("Sigmoid", "c", "s"), *coded("s", "y")], False),
    "read twice": ([CONV, *coded("c", "d"), made("GlobalMaxPool", "c", "g"), made("Add", "d g", "y")], False),
    "matrix product": ([made("Flatten", "x", "f"), made("MatMul", "f m", "c"), *coded("c", "y")], False),
    "computed bias": ([made("Abs", "b", "a"), made("Mul", "a one", "s"), made("Conv", "x w s", "c"), *coded("c", "y")], False),
    "a guard": ([made("Max", "x lowest", "g"), made("Conv", "g w b", "c"), RELU, *coded("r", "y")], False),
}  # fmt: skip


def model(nodes: list[NodeProto], *outputs: str) -> ModelProto:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "step": np.float32(0.02), "zero": np.uint8(100), "low": np.float32(0), "high": np.float32(6),
        "lowest": np.array(np.finfo(np.float32).min),
        "w": rng.normal(size=(8, 4, 3, 3)), "v": rng.normal(size=(4, 8, 3, 3)), "m": rng.normal(size=(144, 8)),
        "b": rng.normal(size=8), "flat": [2, -1],
    }  # fmt: skip
    for name in "wvm":
        arrays[name] = (
            arrays[name] * 0.1 * np.linspace(0.05, 1, 8).reshape([8 if size == 8 else 1 for size in arrays[name].shape])
        )
    stored = [
        numpy_helper.from_array(np.asarray(array, {"zero": np.uint8, "flat": np.int64}.get(name, np.float32)), name)
        for name, array in arrays.items()
    ]
    value = helper.make_tensor_value_info
    given = [value("input", TensorProto.FLOAT, [2, 4, 6, 6]), value("one", TensorProto.FLOAT, [1])]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        [*coded("input", "x"), *nodes], "g", given[: 2 if "one" in used else 1],
        [value(name, TensorProto.FLOAT, None) for name in ("y", *outputs)],
        [tensor for tensor in stored if tensor.name in {*used, "step", "zero"}],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def error(file: ModelProto) -> float:
    """Return the largest difference between ONNX Runtime and the file in float64, in steps of the codes."""
    images = np.random.default_rng(1).uniform(-2, 3, (2, 4, 6, 6)).astype(np.float32)
    feeds = {"input": images, "one": np.ones(1, np.float32)}
    feeds = {value.name: feeds[value.name] for value in file.graph.input}
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    return float(np.abs(session.run(None, feeds)[0] - IntegerEmulator(file).evaluate(feeds)["y"]).mean() / 0.02)


@pytest.mark.parametrize("form", FORMS)
def test_the_rounded_layers_are_those_of_onnx_runtime(form: str) -> None:
    nodes, rounded = FORMS[form]
    file = model(nodes)
    assert [node.op_type for node in rounded_float_layers(file)] == [
        node.op_type for node in nodes if node.op_type in ("Conv", "ConvTranspose", "Gemm") and rounded
    ]
    assert (error(file) > 0.01) == rounded


def test_an_output_of_the_graph_counts_as_no_reader() -> None:
    for nodes, output, rounded in ((FORMS["convolution"][0], "c", True), (FORMS["pooled after"][0], "p", False)):
        file = model(nodes, output)
        assert [node.op_type for node in rounded_float_layers(file)] == ["Conv"] * rounded
        assert (error(file) > 0.01) == rounded


@pytest.mark.parametrize("form", [form for form, (_, rounded) in FORMS.items() if rounded])
def test_a_guard_keeps_the_weight(form: str) -> None:
    file = model(FORMS[form][0])
    guarded = guarded_model(file)
    assert error(guarded) < 0.001
    assert rounded_float_layers(guarded) == []
    feeds = {"input": np.random.default_rng(2).normal(size=(2, 4, 6, 6)).astype(np.float32)}
    assert (Float64Evaluator(guarded).evaluate(feeds)["y"] == Float64Evaluator(file).evaluate(feeds)["y"]).all()


class Between(nn.Module):
    """A convolution with outliers in its weight and a transposed one, each between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wild, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 1)
        self.up, self.bn3 = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.BatchNorm2d(8)
        self.last, self.bn4 = nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn2(self.wild(torch.relu(self.bn1(self.first(x))))))
        x = torch.relu(self.middle(nn.functional.max_pool2d(x, 2)))
        x = torch.relu(self.bn4(self.last(torch.relu(self.bn3(self.up(x))))))
        return self.head(x.mean((2, 3)))


def in_int8(network: nn.Module, folder: Path, *float_layers: str) -> tuple[ModelProto, Int8Result]:
    """Return the folded float32 file and its int8 file."""
    float_model = folded(exact_statistics(network), folder)
    made = quantise(
        float_model, {"input": images(2)}, lambda feeds: seen_in_module(network, feeds), preprocessing=PIXELS,
        options=Int8Options(float_layers=float_layers), calibration=Calibration({"input": images(64, seed=1)}, "64 images"),
    )  # fmt: skip
    return float_model, made


def reasons(float_model: ModelProto, int8_model: ModelProto, made: Int8Result) -> dict[str, str]:
    """Return the failed checks of the file proof, and why."""
    found = findings(Int8File(float_model, int8_model, made.record))
    return {item.check: item.reason for item in found if not item.passed}


def test_layers_that_the_user_keeps_in_float_stay_there(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = Between()
    with torch.no_grad():
        network.wild.weight[:, :, 1, 1] *= 40
    float_model, made = in_int8(network, tmp_path, "wild")
    assert reasons(float_model, made.model, made) == {}
    stored = {tensor.name: tensor for tensor in made.model.graph.initializer}
    guards = {node.output[0] for node in made.model.graph.node if is_guard(node, stored)}
    assert [node.op_type for node in made.model.graph.node if node.input[0] in guards] == ["Conv", "ConvTranspose"]
    feeds = {"input": images(32, seed=9)}
    session = onnxruntime.InferenceSession(made.model.SerializeToString(), providers=["CPUExecutionProvider"])
    found, expected = session.run(None, feeds)[0], IntegerEmulator(made.model).evaluate(feeds)["logits"]
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_an_operator_of_another_domain_is_not_a_guard(tmp_path: Path) -> None:
    """A function of the file's own may be called Max."""
    torch.manual_seed(5)
    float_model, made = in_int8(Between(), tmp_path)
    changed = ModelProto.FromString(made.model.SerializeToString())
    (guard,) = (node for node in changed.graph.node if node.op_type == "Max")
    guard.domain = "evil"
    assert list(reasons(float_model, changed, made)) == ["structure"]


def test_a_max_with_another_number_is_not_a_guard(tmp_path: Path) -> None:
    """The file proof must not overlook an operator that changes values."""
    torch.manual_seed(5)
    float_model, made = in_int8(Between(), tmp_path)
    changed = ModelProto.FromString(made.model.SerializeToString())
    (guard,) = (node for node in changed.graph.node if node.op_type == "Max")
    for tensor in changed.graph.initializer:
        if tensor.name == guard.input[1]:
            tensor.CopyFrom(numpy_helper.from_array(np.array(np.float32(0.1)), tensor.name))
    found = reasons(float_model, changed, made)
    assert list(found) == ["structure"]
    assert "nodes, the float32 file" in found["structure"]
