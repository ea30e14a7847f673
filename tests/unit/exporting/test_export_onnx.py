"""The written file is as requested: operator set, format, names, batch, weights, and no trace of the machine."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import CASES, Case, randomise
from torch import nn

import bnexport
from bnexport.errors import ExportError
from bnexport.exporting.export_onnx import check_model, export_onnx, stamp_metadata
from bnexport.exporting.export_request import OnnxTarget
from bnexport.exporting.formats import export_torchscript
from bnexport.exporting.signature import ExportJob, signature_of
from bnexport.folding.torch_backend.trace import trace
from bnexport.tensors import Signature

_SKIPPED = (
    "unbatched-conv1d", "training-mode", "no-statistics", "weight-changed-in-forward", "monte-carlo-dropout",
    "avg-pool-divisor",
    # torch.onnx supports it since 2.12
    *(("adaptive-max-pool-positive",) if torch.__version__ < (2, 12) else ()),
)  # fmt: skip
EXPORTED = tuple(case for case in CASES if case.name not in _SKIPPED)


def export(case: Case, folder: Path) -> tuple[bnexport.FoldResult, Signature]:
    result = bnexport.fold(case.model(), case.inputs(), clamps=case.clamps, max_growth=case.max_growth)
    names = tuple(f"input_{index}" for index in range(len(case.shapes)))
    signature = signature_of(result.model, case.inputs(), input_names=names)
    path = folder / "model.onnx"
    export_onnx(ExportJob(result.model, case.inputs(), signature), path)
    export_torchscript(result.model, folder / "model.pt")
    return result, signature


@pytest.mark.sampled(16, 1)
@pytest.mark.parametrize("case", EXPORTED, ids=[case.name for case in EXPORTED])
def test_both_formats_compute_what_the_original_does(case: Case, tmp_path: Path) -> None:
    _, signature = export(case, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    script = torch.jit.load(tmp_path / "model.pt")
    for batch in (1, 2, 5):
        inputs = case.inputs(seed=batch, batch=batch)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(case.model().double()(*(item.double() for item in inputs)))
            scripted = torch.utils._pytree.tree_leaves(script(*inputs))
        feeds = {spec.name: item.numpy() for spec, item in zip(signature.inputs, inputs, strict=True)}
        for want, have, also in zip(expected, session.run(None, feeds), scripted, strict=True):
            scale = float(want.abs().max())
            assert float(np.abs(have - want.numpy()).max()) <= 3e-6 * scale
            assert float((also - want).abs().max()) <= 3e-6 * scale


def lenet() -> tuple[bnexport.FoldResult, Signature, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = randomise(bnexport.bn_lenet()).eval()
    inputs = (torch.randn(2, 1, 28, 28),)
    result = bnexport.fold(model, inputs)
    return result, signature_of(result.model, inputs, input_names=("input",)), inputs


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lenet")
    result, signature, inputs = lenet()
    export_onnx(ExportJob(result.model, inputs, signature), folder / "model.onnx")
    export_torchscript(result.model, folder / "model.pt")
    torch.save(result.model.state_dict(), folder / "folded.pt")
    return folder


def test_default_target_is_opset_18_and_ir_8(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version == 8
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_weights_of_both_files_are_the_folded_ones_bit_for_bit(exported: Path) -> None:
    folded = torch.load(exported / "folded.pt", weights_only=True)
    model = onnx.load(exported / "model.onnx")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert set(folded) <= set(stored)
    for name, tensor in folded.items():
        assert stored[name].tobytes() == tensor.numpy().tobytes(), name
    frozen = torch.jit.load(exported / "model.pt")
    constants = [node.output().toIValue() for node in frozen.graph.findAllNodes("prim::Constant")]
    bits = {item.numpy().tobytes() for item in constants if isinstance(item, torch.Tensor) and item.is_floating_point()}
    assert {tensor.numpy().tobytes() for tensor in folded.values()} <= bits


def test_no_local_path_is_in_the_bytes(exported: Path) -> None:
    content = (exported / "model.onnx").read_bytes()
    for place in (str(Path.cwd()), str(Path.home()), os.path.dirname(torch.__file__), str(exported), "site-packages"):
        assert place.encode() not in content
    assert str(Path.cwd()).encode() not in (exported / "model.pt").read_bytes()


@pytest.mark.slow
def test_same_bytes_from_another_process_and_folder(exported: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from unit.exporting.test_export_onnx import lenet\n"
        "from bnexport.exporting.export_onnx import export_onnx\n"
        "from bnexport.exporting.signature import ExportJob\n"
        "result, signature, inputs = lenet()\n"
        "export_onnx(ExportJob(result.model, inputs, signature), Path(sys.argv[1]) / 'model.onnx')\n"
    )
    tests = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(tests), str(tests.parent)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("opset", "ir_version", "written"), [(17, None, 8), (18, 9, 9), (20, None, 9), (21, None, 10)])
def test_other_targets_are_written_as_requested(
    opset: int, ir_version: int | None, written: int, tmp_path: Path
) -> None:
    result, signature, inputs = lenet()
    target = OnnxTarget(opset, ir_version)
    export_onnx(ExportJob(result.model, inputs, signature, target), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert model.opset_import[0].version == opset
    assert model.ir_version == written
    onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("target", [OnnxTarget(16), OnnxTarget(999), OnnxTarget(21, 8), OnnxTarget(18, 99)])
def test_impossible_targets_are_refused(target: OnnxTarget) -> None:
    with pytest.raises(ExportError):
        target.resolved_ir_version()


#: Fault -> a part of the model, the changed field and its value.
FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], object], str, object]] = {
    "renamed input": (lambda model: model.graph.input[0], "name", "x"),
    "fixed batch": (lambda model: model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 2),
    "other opset": (lambda model: model.opset_import[0], "version", 17),
    "norm left": (lambda model: model.graph.node[0], "op_type", "BatchNormalization"),
    "external data": (lambda model: model.graph.initializer[0], "data_location", onnx.TensorProto.EXTERNAL),
    "another IR version": (lambda model: model, "ir_version", 9),
}


@pytest.mark.parametrize("fault", [*FAULTS, "missing weight"])
def test_a_file_that_differs_from_the_request_is_refused(fault: str, exported: Path) -> None:
    _, signature, _ = lenet()
    model = onnx.load(exported / "model.onnx")
    check_model(model, signature, 18, 8)
    if fault in FAULTS:
        part, field, value = FAULTS[fault]
        setattr(part(model), field, value)
    else:
        next(node for node in model.graph.node if node.op_type == "Conv").input[1] = "nowhere"
    with pytest.raises(ExportError):
        check_model(model, signature, 18, 8)


def test_stamping_metadata_leaves_graph_and_weights(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((exported / "model.onnx").read_bytes())
    before = onnx.load(path).graph.SerializeToString(deterministic=True)
    stamp_metadata(path, {"b": "2", "a": "1"})
    model = onnx.load(path)
    assert model.graph.SerializeToString(deterministic=True) == before
    assert [(item.key, item.value) for item in model.metadata_props] == [("a", "1"), ("b", "2")]


def test_the_exporter_does_not_fold(tmp_path: Path) -> None:
    """torch.onnx's own optimiser fuses both of these, the one in training mode wrongly."""
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 8, 8),)
    for layer, training in ((nn.ConvTranspose2d(3, 6, 3), False), (nn.Conv2d(3, 6, 3), True)):
        model = randomise(nn.Sequential(layer, nn.BatchNorm2d(6))).eval()
        model[1].train(training)
        graph = trace(model, inputs)  # as it is: nothing has been folded
        signature = signature_of(graph, inputs, input_names=("input",))
        export_onnx(ExportJob(graph, inputs, signature), tmp_path / "model.onnx")
        operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
        assert operators.count("BatchNormalization") == 1


def test_parts_that_the_exporter_drops_silently_are_refused(tmp_path: Path) -> None:
    """torch.onnx writes an average pooling without its divisor, which gives other numbers."""
    inputs = (torch.randn(2, 3, 8, 8),)
    graph = trace(nn.Sequential(nn.Conv2d(3, 6, 3), nn.AvgPool2d(2, divisor_override=3)).eval(), inputs)
    signature = signature_of(graph, inputs, input_names=("input",))
    with pytest.raises(ExportError, match="divisor_override"):
        export_onnx(ExportJob(graph, inputs, signature), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_unknown_operator_gives_one_sentence(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    inputs = (torch.randn(2, 3),)
    folded = bnexport.fold(Odd(), inputs).model
    signature = signature_of(folded, inputs, input_names=("input",))
    with pytest.raises(ExportError, match=r"torch\.onnx can't export the folded graph: .*bessel_j0") as caught:
        export_onnx(ExportJob(folded, inputs, signature), tmp_path / "model.onnx")
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_adaptive_pooling_of_the_input_in_half_precision(tmp_path: Path) -> None:
    """The cast of the input has no recorded shape."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten()).eval()
    request = bnexport.ExportRequest(inputs=("3x8x8",), precision="float16", formats=("onnx",), allow_untrained=True)
    result = bnexport.fold_and_export(network, tmp_path / "network" / "1", request=request)
    assert result.verification.passed, result.verification.summary()
