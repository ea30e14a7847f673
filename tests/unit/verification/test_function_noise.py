"""The accuracy of a runtime's own functions: measured, predicted, and no excuse for a fault.

The tables were measured with one version of each engine on one kind of processor. There, they have to be close to what the
engine does. Another version or processor has other kernels, which may be more exact, and which may be less exact by a small
factor. An error above that factor fails here too, because a verification on that machine would then refuse a right engine.
"""

import copy
import importlib
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cases import randomise
from onnx import helper
from support.onnx_builder import model_of
from torch import nn

import bnexport
from bnexport.exporting.export_request import ExportRequest
from bnexport.onnx_files.emulation import APPROXIMATED, SUMMED_IN_LINE, ApproximatingEvaluator, approximated_operators
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner
from bnexport.tensors import Array
from bnexport.verification.verify import verify

#: Versions and vector instructions (``torch.backends.cpu.get_cpu_capability``) with which the tables were measured.
VERSIONS, CAPABILITY = {"onnxruntime-cpu": "1.31.1", "openvino-cpu": "2026.4.1"}, "AVX2"
#: Factor by which other kernels may be less exact than the tables: from 8 lanes to 4, sums in line lose a factor of 2.2.
_ELSEWHERE = 4.0
ROWS = [(runtime, operator) for runtime, table in APPROXIMATED.items() for operator in table]
EXACT = {
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Erf": lambda x: np.vectorize(math.erf)(x),
    "Softplus": lambda x: np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0),
}


def measured_here(runtime: str) -> bool:
    """Return True on the kind of machine on which the tables were measured."""
    module = importlib.import_module(runtime.removesuffix("-cpu"))
    same = str(module.__version__).startswith(VERSIONS[runtime])
    return same and platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() == CAPABILITY


def one_node(operator: str, *shape: int | str, **constants: Array) -> onnx.ModelProto:
    return model_of([helper.make_node(operator, ["x", *constants], ["y"])], shape, constants)


def computed(runtime: str, model: onnx.ModelProto, x: Array) -> Array:
    content = model.SerializeToString()
    if runtime == "openvino-cpu":
        openvino = pytest.importorskip("openvino")
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.asarray(compiled([x])[0])
    import onnxruntime

    return np.asarray(onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])


@pytest.mark.parametrize(("runtime", "operator"), ROWS)
def test_the_table_is_what_the_engine_does(runtime: str, operator: str) -> None:
    x = np.linspace(-30, 30, 120_001).astype(np.float32)
    found = computed(runtime, one_node(operator, "n"), x)
    error = float(np.abs(found - EXACT[operator](x.astype(np.float64))).max())
    stated, here = APPROXIMATED[runtime][operator], measured_here(runtime)
    assert error <= (1.2 if here else _ELSEWHERE) * stated, (
        "put this error into APPROXIMATED, with processor and version"
    )
    assert error > stated / 4 or not here


@pytest.mark.parametrize(
    ("runtime", "operator"), [(name, kind) for name, row in SUMMED_IN_LINE.items() for kind in row]
)
def test_sums_in_line_are_the_engine_s(runtime: str, operator: str) -> None:
    """Behind a convolution, which decides OpenVINO's order of the numbers."""
    axes = {} if operator == "GlobalAveragePool" else {"axes": np.array([2, 3])}
    same = {"w": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node(operator, ["c", *axes], ["y"])]
    model = model_of(nodes, ("n", 8, 112, 112), same | axes)
    values = np.random.default_rng(0).standard_normal((1, 8, 1, 1)).astype(np.float32)
    x = np.tile(values, (1, 1, 112, 112))
    exact = Float64Evaluator(model).evaluate({"x": x})["y"]
    predicted = ApproximatingEvaluator(model, runtime, seed=0).evaluate({"x": x})["y"] - exact
    error = computed(runtime, model, x) - exact
    ratio, here = np.linalg.norm(error) / np.linalg.norm(predicted), measured_here(runtime)
    assert ratio < (2 if here else _ELSEWHERE), "put the engine's lanes on this processor into SUMMED_IN_LINE"
    assert not here or (ratio > 0.5 and np.abs(error).max() > 4e-6 * np.abs(exact).max())


def test_equal_arguments_have_equal_errors() -> None:
    model = one_node("Sigmoid", "n")
    feeds = {"x": np.array([-9.0, -9.0, -8.0])}
    draws = [ApproximatingEvaluator(model, "onnxruntime-cpu", seed=seed).evaluate(feeds)["y"] for seed in range(3)]
    exact = Float64Evaluator(model).evaluate(feeds)["y"]
    assert all(draw[0] == draw[1] for draw in draws)
    assert len({draw[0] for draw in draws}) == 3
    assert all(0 < np.abs(draw - exact).max() <= 1.5e-7 for draw in draws)
    assert approximated_operators(model, "torch-cpu") == ()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Probabilities near 2e-4, which ONNX Runtime's Sigmoid computes with three digits."""
    torch.manual_seed(0)
    head = nn.Conv2d(4, 3, 1)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), head, nn.Sigmoid())
    randomise(module)
    nn.init.uniform_(head.weight, -0.02, 0.02)
    nn.init.constant_(head.bias, -9.0)
    return module.eval()


@pytest.fixture(scope="module")
def result(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("noise") / "network" / "1"
    return bnexport.fold_and_export(network, out, request=ExportRequest(inputs=("3x16x16",), formats=("onnx",)))


def test_the_accuracy_of_a_sigmoid_is_not_a_fault(result: Any) -> None:
    assert result.verification.passed, result.verification.summary()
    rows = [row for row in result.verification.rows if row.stage == "strict" and row.run == "onnxruntime-cpu"]
    explained = [row for row in rows if "Sigmoid" in row.reason]
    assert explained or not measured_here("onnxruntime-cpu")
    assert all(row.error is not None and row.error > 1e-5 for row in explained)


@pytest.mark.parametrize("size", [64, 96])
def test_a_mean_that_is_summed_in_line_is_not_a_fault(size: int, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )  # fmt: skip
    randomise(network)
    request = ExportRequest(inputs=(f"3x{size}x{size}",), formats=("onnx",))
    result = bnexport.fold_and_export(network.eval(), tmp_path / "network" / "1", request=request)
    assert result.verification.passed, result.verification.summary()
    rows = [row for row in result.verification.rows if row.stage == "strict" and row.run == "openvino-cpu"]
    assert any("ReduceMean" in row.reason for row in rows) or not measured_here("openvino-cpu")


@pytest.mark.parametrize("share", [0.01, -0.004])
def test_a_fault_of_the_kernels_is_caught(
    result: Any, network: nn.Module, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxRuntimeRunner._run

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        return {name: array * np.float32(1 + share) for name, array in run(self, *args, **options).items()}

    monkeypatch.setattr(OnnxRuntimeRunner, "_run", wrong)
    report = verify(result.bundle, module=network, runtimes=("onnxruntime-cpu",))
    assert any(row.stage == "strict" and not row.passed for row in report.rows)


def test_a_wrong_file_is_caught(result: Any, network: nn.Module, tmp_path: Path) -> None:
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[1].running_var.mul_(256 / 255)
    report = verify(result.bundle, module=other, runtimes=("onnxruntime-cpu",))
    assert any(row.stage == "file-proof" and not row.passed for row in report.rows)
