"""The whole flow on a small network: one bundle, all of it or nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import Graph, randomise
from torch import nn

import bnexport
from bnexport.bundle import GOLDEN, MANIFEST, MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, REPORT, WEIGHTS, Bundle
from bnexport.errors import ExportError, ModelError, OutputError, RefusedModel, UsageError
from bnexport.exporting.export_request import ExportRequest, OnnxTarget
from bnexport.loading.sources import load_source
from bnexport.verification.verdict import Row, VerificationReport
from bnexport.verification.verify import verify


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(6 * 36, 5))
    return randomise(nn.Sequential(*layers, nn.BatchNorm1d(5)))


REQUEST = ExportRequest(inputs=("3x8x8",), labels=tuple("abcde"))


@pytest.fixture(scope="module")
def verified() -> dict[str, object]:
    """File -> its hash when ``result`` was verified."""
    return {}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, verified: dict[str, object]) -> bnexport.pipeline.ExportResult:
    def remembering(bundle: Bundle, **options: Any) -> VerificationReport:
        verified.update({name: facts["sha256"] for name, facts in bundle.manifest.files.items()})
        return verify(bundle, **options)

    out = tmp_path_factory.mktemp("repository") / "small" / "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnexport.pipeline.verify", remembering)
        return bnexport.fold_and_export(network(), out, request=REQUEST)


def test_bundle_is_complete_and_passes(result: bnexport.pipeline.ExportResult) -> None:
    assert result.verification.passed
    assert result.bundle is not None
    folder = result.bundle.path
    expected = {
        MODEL_ONNX,
        MODEL_TORCHSCRIPT,
        MODEL_EXPORTED,
        WEIGHTS,
        REPORT,
        f"{GOLDEN}/input_0.pb",
        f"{GOLDEN}/output_0.pb",
    }
    assert set(result.bundle.manifest.files) == expected
    assert result.bundle.problems() == []
    assert sorted(item.name for item in folder.parent.iterdir()) == ["1", "config.pbtxt"]
    assert (folder.stat().st_mode & 0o777) == (folder.parent.stat().st_mode & 0o777 | 0o055) & 0o777


def test_manifest_states_what_a_server_needs(result: bnexport.pipeline.ExportResult) -> None:
    assert result.bundle is not None
    value = json.loads((result.bundle.path / MANIFEST).read_text())
    assert value["signature"]["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", 3, 8, 8]}]
    assert value["labels"] == list("abcde")
    assert value["onnx"] == {"opset": 18, "ir_version": 8, "precision": "float32"}
    assert [row["outcome"] for row in value["fold"]["rows"]] == ["backward", "backward"]
    assert value["verification"]["passed"] is True
    assert {"torch", "onnx", "numpy"} <= set(value["environment"]["packages"])


def test_the_shipped_files_are_the_verified_ones(
    result: bnexport.pipeline.ExportResult, verified: dict[str, object]
) -> None:
    assert result.bundle is not None
    shipped = {name: facts["sha256"] for name, facts in result.bundle.manifest.files.items() if name != REPORT}
    assert {MODEL_ONNX, MODEL_TORCHSCRIPT, MODEL_EXPORTED, WEIGHTS} < set(shipped)
    assert shipped == verified


def test_model_file_carries_labels(result: bnexport.pipeline.ExportResult) -> None:
    assert result.bundle is not None
    model = onnx.load(result.bundle.file(MODEL_ONNX))
    metadata = {item.key: item.value for item in model.metadata_props}
    assert json.loads(metadata["bnexport.labels"]) == list("abcde")


def test_golden_outputs_are_the_original_networks(result: bnexport.pipeline.ExportResult) -> None:
    assert result.bundle is not None
    inputs, outputs = result.bundle.golden()
    with torch.no_grad():
        expected = network().eval().double()(torch.tensor(inputs["input"]).double()).numpy()
    np.testing.assert_array_equal(outputs["logits"], expected.astype(np.float32))
    session = onnxruntime.InferenceSession(result.bundle.file(MODEL_ONNX), providers=["CPUExecutionProvider"])
    (have,) = session.run(None, inputs)
    assert float(np.abs(have - expected).max()) <= 1e-5 * float(np.abs(expected).max())


NET = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps={first}), nn.ReLU(), nn.Dropout(), nn.Flatten(),
                         nn.Linear(216, 5), nn.BatchNorm1d(5, eps={second}))
"""


def test_unfolded_weights_and_the_networks_code_verify(result: bnexport.pipeline.ExportResult, tmp_path: Path) -> None:
    assert result.bundle is not None
    model = network()
    (tmp_path / "net.py").write_text(NET.format(first=model[1].eps, second=model[6].eps))
    loaded = load_source(f"{tmp_path}/net.py:build", weights=result.bundle.file(WEIGHTS))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor), name
    assert bnexport.verify(result.bundle, module=loaded.module).passed


def test_code_with_another_eps_does_not_verify(result: bnexport.pipeline.ExportResult, tmp_path: Path) -> None:
    """eps is in no weights file: the golden vectors show that this is not the network that was exported."""
    assert result.bundle is not None
    (tmp_path / "net.py").write_text(NET.format(first=1e-5, second=1e-5))
    loaded = load_source(f"{tmp_path}/net.py:build", weights=result.bundle.file(WEIGHTS))
    report = bnexport.verify(result.bundle, module=loaded.module)
    assert not report.passed
    assert report.failures[0].stage == "golden-reference"


def test_same_bytes_again(result: bnexport.pipeline.ExportResult, tmp_path: Path) -> None:
    assert result.bundle is not None
    again = bnexport.fold_and_export(network(), tmp_path / "small" / "1", request=REQUEST)
    assert again.bundle is not None
    for name in (MODEL_ONNX, WEIGHTS, f"{GOLDEN}/input_0.pb", f"{GOLDEN}/output_0.pb"):
        assert again.bundle.file(name).read_bytes() == result.bundle.file(name).read_bytes(), name


def files(folder: Path) -> list[str]:
    return sorted(str(item.relative_to(folder)) for item in folder.rglob("*"))


def test_failed_verdict_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = VerificationReport((Row("strict", "onnxruntime-cpu", "noise", passed=False, reason="made to fail"),))
    monkeypatch.setattr("bnexport.pipeline.verify", lambda *_args, **_options: failing)
    result = bnexport.fold_and_export(network(), tmp_path / "small" / "1", request=REQUEST)
    assert result.bundle is None
    assert not result.verification.passed
    assert [name for name in files(tmp_path) if name != "small"] == []


def test_existing_bundle_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "small" / "1"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        bnexport.fold_and_export(network(), out, request=REQUEST)
    assert files(tmp_path) == ["small", "small/1", "small/1/mine.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[0].weight.data.view(-1)[3:4].fill_(float("nan")), "0.weight holds NaN"),
        (lambda m: m[1].running_var.data[2:3].fill_(float("inf")), "1.running_var holds infinity"),
        (lambda m: m[1].running_var.data[2:3].fill_(-0.5), "1.running_var holds a negative variance"),
        (lambda m: m[6].reset_running_stats(), "6 is a BatchNorm1d that was never trained"),
    ],
)
def test_nonsense_is_refused_by_name(change: object, message: str, tmp_path: Path) -> None:
    model = network()
    change(model)  # type: ignore[operator]
    with pytest.raises(RefusedModel, match=message):
        bnexport.fold_and_export(model, tmp_path / "small" / "1", request=REQUEST)
    assert files(tmp_path) == []


def test_untrained_is_accepted_on_request(tmp_path: Path) -> None:
    model = network()
    model[6].reset_running_stats()
    request = ExportRequest(inputs=("3x8x8",), allow_untrained=True)
    assert bnexport.fold_and_export(model, tmp_path / "small" / "1", request=request).bundle is not None


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(
        Graph(
            lambda m, x, y: {"sum": m.bn(m.conv(x)).mean((2, 3)) + m.fc(y), "first": x[:, 0]},
            conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), fc=nn.Linear(4, 6),
        )
    )  # fmt: skip
    request = ExportRequest(inputs=("image=3x8x8", "side=4"), onnx=OnnxTarget(17))
    result = bnexport.fold_and_export(model, tmp_path / "two" / "3", request=request)
    assert result.verification.passed, result.verification.summary()
    assert result.bundle is not None
    signature = result.bundle.manifest.signature
    assert [spec.name for spec in signature.inputs] == ["image", "side"]
    assert [spec.shape for spec in signature.outputs] == [("batch", 6), ("batch", 8, 8)]
    assert result.bundle.manifest.onnx == {"opset": 17, "ir_version": 8, "precision": "float32"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_get_one_sentence(dtype: torch.dtype, tmp_path: Path) -> None:
    request = ExportRequest(inputs=(f"3x8x8:{'float32' if dtype is torch.bfloat16 else str(dtype)[6:]}",))
    with pytest.raises((ExportError, ModelError)):
        bnexport.fold_and_export(network().to(dtype), tmp_path / "small" / "1", request=request)
    assert files(tmp_path) == []


def test_bytes_as_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(Graph(lambda m, x: m.bn(m.conv(x.float() / 255)), conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)))
    request = ExportRequest(inputs=("3x8x8:uint8",))
    result = bnexport.fold_and_export(model, tmp_path / "bytes" / "1", request=request)
    assert result.verification.passed, result.verification.summary()
    assert result.bundle is not None
    assert int(result.bundle.golden()[0]["input"].max()) > 200


def test_one_output_returned_twice_is_refused(tmp_path: Path) -> None:
    model = randomise(Graph(lambda m, x: (lambda y: (y, y))(m.bn(x)), bn=nn.BatchNorm2d(3)))
    with pytest.raises(ExportError, match="one tensor twice"):
        bnexport.fold_and_export(model, tmp_path / "twice" / "1", request=ExportRequest(inputs=("3x8x8",)))
    assert files(tmp_path) == []


def test_a_full_disk_at_the_end_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OutputError("the disk is full", remedy="Free some space")

    monkeypatch.setattr("bnexport.pipeline.write_triton_config", full)
    with pytest.raises(OutputError):
        bnexport.fold_and_export(network(), tmp_path / "small" / "1", request=REQUEST)
    assert files(tmp_path) == []


def test_wrong_requests(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not of the form"):
        bnexport.fold_and_export(network(), tmp_path / "small", request=REQUEST)
    with pytest.raises(UsageError, match="input is not known"):
        bnexport.fold_and_export(network(), tmp_path / "small" / "1")
    request = ExportRequest(inputs=("3x8x8",), onnx=OnnxTarget(21, 8))
    with pytest.raises(ExportError, match="IR version"):
        bnexport.fold_and_export(network(), tmp_path / "small" / "1", request=request)
    assert files(tmp_path) == []


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow must not depend on a data set."""
    monkeypatch.delenv("BNEXPORT_DATA", raising=False)
