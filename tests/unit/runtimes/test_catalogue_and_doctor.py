import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest

from bnexport.errors import UsageError
from bnexport.runtimes import doctor, small_model
from bnexport.runtimes.catalogue import RUNNERS, runner_spec


def test_names_are_unique_and_found() -> None:
    names = [spec.name for spec in RUNNERS]
    assert len(set(names)) == len(names)
    assert {"torch-export-cpu", "torch-export-cuda", "reference-cpu"} <= set(names)
    assert not runner_spec("reference-cpu").default
    assert all(runner_spec(name).name == name for name in names)
    assert {spec.device for spec in RUNNERS} >= {"cpu", "cuda"}
    with pytest.raises(UsageError, match="runtime 'tensorflow' is unknown") as caught:
        runner_spec("tensorflow")
    assert "onnxruntime-cpu" in caught.value.remedy


def test_availability_is_a_reason_or_none() -> None:
    for spec in RUNNERS:
        reason = spec.available()
        assert reason is None if spec.device == "cpu" else reason is None or "\n" not in reason


def test_the_small_model_is_the_same_in_numpy_and_torch() -> None:
    import torch

    images = np.random.default_rng(3).standard_normal((6, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        theirs = small_model.torch_module().double()(torch.from_numpy(images).double()).numpy()
    np.testing.assert_allclose(small_model.expected(images), theirs, rtol=1e-12)


def test_the_small_model_is_onnx_and_is_written_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        small_model.write_onnx(tmp_path / "small.onnx")
    model = onnx.load(tmp_path / "small.onnx")
    onnx.checker.check_model(model, full_check=True)
    operators = [node.op_type for node in model.graph.node]
    assert operators[0] == "Conv"
    assert operators[1:6] == ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"]  # as exporters write a flatten
    assert operators[6:] == ["Concat", "ConstantOfShape", "Add", "Gemm"]  # a tensor that is made in forward
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert (model.ir_version, model.opset_import[0].version) == (small_model.IR_VERSION, small_model.OPSET)
    images = np.random.default_rng(4).standard_normal((5, 1, 8, 8)).astype(np.float32)
    (answer,) = onnx.reference.ReferenceEvaluator(model).run(None, {"input": images})
    truth = small_model.expected(images)
    assert np.abs(answer - truth).max() <= doctor.BOUND * np.abs(truth).max()


def test_the_small_models_of_torch_take_any_batch_and_make_a_tensor_where_the_input_is(tmp_path: Path) -> None:
    import torch

    small_model.write_torchscript(tmp_path / "small.pt")
    script = torch.jit.load(tmp_path / "small.pt")
    assert script(torch.zeros(5, 1, 8, 8)).shape == (5, 3)
    assert "torch.ones(" in script.code
    (device,) = re.findall(r"torch\.ones\(.*device=(\w+)", script.code)
    assert f"{device} = ops.prim.device(maps)" in script.code
    small_model.write_exported(tmp_path / "small.pt2")
    program = torch.export.load(tmp_path / "small.pt2")
    factories = torch.ops.aten.ones.default, torch.ops.aten.full.default
    assert sum(node.target in factories for node in program.graph.nodes) == 1
    assert program.module()(torch.zeros(7, 1, 8, 8)).shape == (7, 3)


def test_of_the_distribution_for_serving_only_onnxruntime_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    sick = doctor.Diagnosis(tuple(doctor.Health(spec.name, works=False) for spec in RUNNERS), {})
    assert {"torch-cpu", "onnxruntime-cpu"} <= {health.runtime for health in sick.broken()}
    monkeypatch.setattr(doctor, "runtime_only", lambda: True)
    monkeypatch.setattr(doctor, "installed", lambda _name: False)
    assert [health.runtime for health in sick.broken()] == ["onnxruntime-cpu"]
    assert [health.runtime for health in sick.broken(["torch-cpu"])] == ["torch-cpu"]


def test_an_extra_is_expected_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    sick = doctor.Diagnosis(tuple(doctor.Health(spec.name, works=False) for spec in RUNNERS), {})
    for there in (True, False):
        monkeypatch.setattr(doctor, "installed", lambda name, there=there: there or name != "openvino")
        assert ("openvino-cpu" in {health.runtime for health in sick.broken()}) is there
    assert [health.runtime for health in sick.broken(["openvino-cpu"])] == ["openvino-cpu"]


def test_packages_to_install_for_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnexport.runtimes import openvino

    openvino.problem.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    try:
        health = next(item for item in doctor.diagnose().runtimes if item.runtime == "openvino-cpu")
        assert not health.works
        assert "needs openvino, which can't be imported" in health.reason
        assert health.remedy == "Install it: pip install 'bnexport[openvino]'"
    finally:
        openvino.problem.cache_clear()


def test_the_doctor_runs_every_cpu_runtime() -> None:
    diagnosis = doctor.diagnose()
    assert [health.runtime for health in diagnosis.runtimes] == [spec.name for spec in RUNNERS]
    for health in diagnosis.runtimes:
        if runner_spec(health.runtime).extra and not health.works:
            assert "which can't be imported" in health.reason  # another test environment
        elif health.runtime.endswith("-cpu"):
            assert health.works, health
            assert health.device == "cpu"
            assert health.error is not None
            assert health.error < 1e-6
        elif not health.works:
            assert health.reason
            assert health.remedy
            assert health.device == ""
    assert diagnosis.broken() == ()
    assert json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))["environment"]["packages"]["torch"]
    with pytest.raises(UsageError):
        diagnosis.broken(["tensorflow"])


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_the_doctor_does_not_believe_wrong_numbers(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    right = small_model.expected
    monkeypatch.setattr(doctor, "expected", lambda images: right(images) * wrong)
    diagnosis = doctor.diagnose()
    assert {health.runtime for health in diagnosis.broken()} == {spec.name for spec in RUNNERS if spec.device == "cpu"}
    assert "outputs are wrong" in diagnosis.broken()[0].reason
    json.dumps(diagnosis.to_json(), allow_nan=False)


@pytest.mark.needs("cuda", "ort-cuda")
def test_the_doctor_runs_every_gpu_runtime() -> None:
    names = [spec.name for spec in RUNNERS if spec.device == "cuda"]
    diagnosis = doctor.diagnose()
    assert diagnosis.broken(names) == ()
    assert all(health.device == "cuda:0" for health in diagnosis.runtimes if health.runtime in names)
