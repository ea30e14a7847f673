"""int8 bundles: the good one passes, predicts and is served; each fault of its file fails; unfit networks are refused."""

import asyncio
import copy
import io
import json
import os
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from rich.console import Console
from support.bundles import copy_bundle, reseal
from support.int8 import PIXELS, folded, images, residual
from support.shared import made_once

from bnexport.bundle import MODEL_EXPORTED, MODEL_FLOAT32, MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle
from bnexport.cli.main import run
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import BadInput, BundleError, UsageError
from bnexport.exporting.export_request import ExportRequest
from bnexport.onnx_files.models import read_model
from bnexport.onnx_pipeline import fold_and_export_onnx
from bnexport.pipeline import fold_and_export
from bnexport.quantization import writer
from bnexport.quantization.integer_emulation import EXACT, SATURATING, IntegerEmulator
from bnexport.reporting.html import verification_page
from bnexport.reporting.tables import print_checks
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner
from bnexport.runtimes.replay import replay_golden
from bnexport.serving.served_model import ServingSettings, open_served
from bnexport.verification.int8 import _at_least, int8_notes, labels_row
from bnexport.verification.scope import Scope
from bnexport.verification.self_test.copies import Copy, FaultTarget
from bnexport.verification.self_test.faults import INT8_FAULTS, spoil_int8
from bnexport.verification.self_test.tester import self_test
from bnexport.verification.verdict import VerificationReport
from bnexport.verification.verify import verify

RUNTIME = "onnxruntime-cpu"
REQUEST = ExportRequest(precision="int8", inputs=("3x16x16",), mean=PIXELS["mean"], std=PIXELS["std"])


def export(folder: Path) -> None:
    result = fold_and_export(residual(), folder / "net" / "1", request=REQUEST)
    assert result.bundle is not None, result.verification.failures


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(made_once(tmp_path_factory, "int8", export) / "net" / "1")


def verified(bundle: Bundle) -> VerificationReport:
    return verify(bundle, module=residual(), runtimes=[RUNTIME], scope=Scope(max_samples=16, drift=False))


def spoiled(bundle: Bundle, tmp_path: Path, fault: str) -> Bundle:
    """Return a copy with one of INT8_FAULTS, whose hashes hold."""
    copied = Copy(FaultTarget(bundle, residual(), 1e-6, {}), copy_bundle(bundle, tmp_path / "net" / "1"))
    spoil_int8(copied, INT8_FAULTS[fault])
    return Bundle.open(copied.folder)


def test_the_good_bundle_passes_with_both_kinds_of_kernels(int8_bundle: Bundle) -> None:
    report = verified(int8_bundle)
    assert report.passed, report.failures
    stages = {(row.stage, row.settings) for row in report.rows if row.subject == RUNTIME}
    assert {(stage, how) for stage in ("strict", "shipping") for how in ("", "precise int8 kernels")} <= stages
    assert any("model.pt and model.pt2 are not written" in text for text in report.findings.warnings)
    assert {MODEL_ONNX, MODEL_FLOAT32} <= set(int8_bundle.manifest.files)
    assert not {MODEL_TORCHSCRIPT, MODEL_EXPORTED} & set(int8_bundle.manifest.files)
    record = int8_bundle.manifest.onnx["quantization"]
    assert record["ranges"]["input"]["source"] == "pixels"
    assert "can saturate 16 bits" in record["pair_safe"]
    assert record["speed"]["of_float32"] > 0
    assert record["speed"]["conditions"].startswith("ONNX Runtime 1.")
    assert record["warnings"] == []  # a measured number is not among them


@pytest.mark.parametrize("ratio", [0.5, 1.5])
def test_int8_that_is_slower_is_a_note_with_the_conditions(ratio: float) -> None:
    notes = int8_notes({"speed": {"of_float32": ratio, "conditions": "one thread"}})
    assert ("int8 is slower than float32: 0.5 x its speed (one thread)" in notes) == (ratio < 1)


def test_the_report_has_the_noise_by_layer_and_the_ranges(int8_bundle: Bundle) -> None:
    report = verify(int8_bundle, module=residual(), runtimes=[RUNTIME], scope=Scope(max_samples=16))
    found = report.findings.int8
    assert found is not None
    assert [layer.layer for layer in found.layers] == ["stem", "deep", "wide", "last", "head"]
    assert 0.5 < sum(layer.share or 0.0 for layer in found.layers) < 1.5
    assert {item.source for item in found.ranges} == {"pixels", "BatchNorm", "derived from BatchNorm"}
    assert all(item.trained == (item.low, item.high) for item in found.ranges if item.source != "pixels")
    assert all(item.seen is not None for item in found.ranges)
    assert VerificationReport.from_json(json.loads(json.dumps(report.to_json()))).findings == report.findings
    schema = resources.files("bnexport.verification").joinpath("report.schema.json").read_text(encoding="utf-8")
    jsonschema.Draft202012Validator(json.loads(schema)).validate(report.to_json())
    page = verification_page(int8_bundle, report, command="bnexport verify")
    assert page.count('class="strip"') >= len(found.layers) + len(found.ranges)
    shown = io.StringIO()
    print_checks(report, Console(file=shown, width=80), verbose=True)
    largest, words = max(found.layers, key=lambda layer: layer.share or 0.0), " ".join(shown.getvalue().split())
    assert f"int8: largest shares of the noise: {largest.layer} {largest.share:.0%}" in words
    assert "int8 ranges by origin: pixels 1" in shown.getvalue()


def test_work_beyond_the_budget_leaves_the_layers_with_the_least_own_noise_out(
    int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnexport.verification.int8._LAYER_WORK", 1.0)
    report = verify(int8_bundle, module=residual(), runtimes=[RUNTIME], scope=Scope(max_samples=16))
    found = report.findings.int8
    assert found is not None
    assert found.n == 1
    left = [layer for layer in found.layers if layer.share is None]
    assert len(left) == 1
    assert left[0].own == min(layer.own for layer in found.layers)
    page = verification_page(int8_bundle, report, command="bnexport verify")
    assert f"Not computed, because their own noise is smaller: {left[0].layer}" in page


def test_the_bundle_is_replayed_as_a_server_does(int8_bundle: Bundle) -> None:
    with runner_spec(RUNTIME).open(int8_bundle) as runner:
        replayed = replay_golden(runner, int8_bundle)
    assert 0 < replayed.error <= replayed.bound


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Images of random size of structure, so that their scores differ: uint8 (n, height, width, channels)."""
    rng = np.random.default_rng(4)
    coarse = rng.integers(0, 256, (24, 2, 2, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 1).repeat(8, 2))


@pytest.fixture(scope="module")
def stated(int8_bundle: Bundle, pixels: np.ndarray) -> np.ndarray:
    """Return the logits that the codes of the written file state, by exact integer arithmetic."""
    feeds = {"input": Preprocessing(**PIXELS).apply(pixels)}
    logits = IntegerEmulator(read_model(int8_bundle.path / MODEL_ONNX), EXACT).evaluate(feeds)["logits"]
    assert len(set(logits.argmax(1))) > 1
    return np.asarray(logits)


def close(found: np.ndarray, stated: np.ndarray) -> bool:
    """Return whether kernels that requantise with another last bit could give these logits."""
    return bool(np.abs(found - stated).max() < 0.02 * np.abs(stated).max())


def test_predict_gives_what_the_file_states(
    int8_bundle: Bundle, pixels: np.ndarray, stated: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "stack.npy", pixels)
    words = ["predict", str(int8_bundle.path), str(tmp_path / "stack.npy")]
    assert run([*words, "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    logits = np.array([row["logits"] for row in printed])
    assert close(logits, stated)
    assert [row["index"] for row in printed] == logits.argmax(1).tolist()
    out = tmp_path / "out"
    assert run([*words, "--out", str(out), "--workers", "1", "--shard-rows", "10", "--logits"]) == 0
    written = pq.read_table(out).to_pydict()
    assert close(np.array(written["logits"]), stated)
    assert written["label"] == [row["label"] for row in printed]


def test_a_server_loads_the_bundle_and_gives_what_the_file_states(
    int8_bundle: Bundle, pixels: np.ndarray, stated: np.ndarray
) -> None:
    async def served() -> np.ndarray:
        model = open_served("net", "1", int8_bundle.path, ServingSettings(workers=2))
        try:
            assert 0 < model.replay.error <= model.replay.bound
            assert model.config()["platform"] == "onnxruntime_onnx"
            return await model.logits(pixels)
        finally:
            await model.close()

    assert close(asyncio.run(served()), stated)


def test_a_server_refuses_a_file_with_other_codes(int8_bundle: Bundle, tmp_path: Path) -> None:
    copied = spoiled(int8_bundle, tmp_path, "codes transposed")
    with pytest.raises(BundleError, match="of scale on the golden vectors, but at most"):
        open_served("net", "1", copied.path, ServingSettings(workers=1))


@pytest.mark.slow
def test_the_self_test_of_an_int8_bundle_catches_every_fault(int8_bundle: Bundle) -> None:
    before = {name: os.stat(int8_bundle.path / name).st_mtime_ns for name in int8_bundle.manifest.files}
    results = self_test(int8_bundle, module=residual())
    assert {name: os.stat(int8_bundle.path / name).st_mtime_ns for name in before} == before
    assert not [result for result in results if result.outcome == "missed"]
    caught = {result.fault: result for result in results if result.outcome == "caught"}
    assert set(INT8_FAULTS) <= set(caught)
    for name in INT8_FAULTS:
        assert "quantization" in caught[name].caught
    absent = [result.reason for result in results if result.outcome == "not tried"]
    assert "the weights are stored in int8, so no engine computes in float32" in absent


def looped() -> ModelProto:
    """Return a file with a convolution, a BatchNorm, and a Loop that applies ReLU twice."""
    values = {
        name: helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("still", TensorProto.BOOL, []),
            ("x", TensorProto.FLOAT, None), ("y", TensorProto.FLOAT, None),
            ("input", TensorProto.FLOAT, ["n", 3, 16, 16]), ("logits", TensorProto.FLOAT, ["n", 4, 14, 14]),
        )
    }  # fmt: skip
    steps = [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Relu", ["x"], ["y"])]
    body = helper.make_graph(steps, "body", [values["i"], values["go"], values["x"]], [values["still"], values["y"]])
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    arrays = {"weight": weight, "times": np.array(2), "start": np.array(True)}
    arrays |= {name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in ("gamma", "beta", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["conv"]),
        helper.make_node("BatchNormalization", ["conv", "gamma", "beta", "mean", "var"], ["norm"]),
        helper.make_node("Loop", ["times", "start", "norm"], ["logits"], body=body),
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "looped", [values["input"]], [values["logits"]], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def in_bfloat16(model: ModelProto) -> ModelProto:
    """Return a file whose inputs, outputs and weights are bfloat16."""
    copied = ModelProto()
    copied.CopyFrom(model)
    for value in (*copied.graph.input, *copied.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    del copied.graph.value_info[:]
    for tensor in copied.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            bits = torch.from_numpy(numpy_helper.to_array(tensor).copy()).bfloat16().view(torch.int16).numpy()
            name, dims = tensor.name, list(tensor.dims)
            tensor.CopyFrom(helper.make_tensor(name, TensorProto.BFLOAT16, dims, bits.tobytes(), raw=True))
    return copied


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("bfloat16", "in torch.bfloat16; int8 is made from float32"),
        ("float16", "in torch.float16; int8 is made from float32"),
        ("float64", "in torch.float64; int8 is made from float32"),
        ("bfloat16.onnx", "is in half precision; bundles are verified in float32"),
        ("loop.onnx", "the network has Loop, whose inner graphs can't be quantised"),
    ],
)
def test_unfit_networks_are_refused_in_one_sentence(source: str, words: str, tmp_path: Path) -> None:
    out = tmp_path / "models" / "net" / "1"
    with pytest.raises(BadInput, match=words) as raised:
        if source.endswith(".onnx"):
            model = looped() if source == "loop.onnx" else in_bfloat16(folded(residual(), tmp_path))
            onnx.save(model, tmp_path / source)
            fold_and_export_onnx(tmp_path / source, out, request=ExportRequest(precision="int8"))
        else:
            fold_and_export(copy.deepcopy(residual()).to(getattr(torch, source)), out, request=REQUEST)
    assert "\n" not in str(raised.value)
    assert raised.value.remedy
    assert not out.exists()


def test_a_file_of_an_old_operator_set_is_converted(tmp_path: Path) -> None:
    model = looped()
    del model.graph.node[2:]
    model.graph.node.append(helper.make_node("Relu", ["norm"], ["relu"]))
    rng = np.random.default_rng(1)
    head = rng.standard_normal((5, 4 * 14 * 14)).astype(np.float32) / 28
    model.graph.initializer.append(numpy_helper.from_array(head, "head"))
    model.graph.node.append(helper.make_node("Flatten", ["relu"], ["flat"]))
    model.graph.node.append(helper.make_node("Gemm", ["flat", "head"], ["logits"], transB=1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5]))
    model.opset_import[0].version = 11
    onnx.save(model, tmp_path / "old.onnx")
    request = ExportRequest(precision="int8", mean=PIXELS["mean"], std=PIXELS["std"], inputs=("3x16x16",))
    result = fold_and_export_onnx(tmp_path / "old.onnx", tmp_path / "net" / "1", request=request)
    assert result.bundle is not None, result.verification.failures
    assert result.bundle.manifest.onnx["opset"] == 13
    assert result.bundle.manifest.onnx["quantization"]["calibration"] == "none: ranges from BatchNorm"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibrate", "one.npy"], "the calibration has 1 sample"),
        (["--calibrate", "constant.npy"], "all samples of the calibration are the same"),
        (["--calibrate", "nan.npy"], "nan.npy holds NaN or infinity in sample 7"),
        (["--calibrate", "shape.npy"], "shape.npy"),
        (["--calibrate", "absent.npy"], "absent.npy"),
        (["--calibrate", "none"], "the network has no BatchNorm from which ranges could be read"),
        (["--calibrate", "right.npy", "--float-layers", "stem2"], "the layer 'stem2', to be kept in float, does not exist"),
    ],
)  # fmt: skip
def test_bad_calibrations_are_refused_in_one_sentence(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folded(residual(), tmp_path)
    arrays = {"right": images(32), "one": images(1), "shape": images(32)[..., :8], "nan": images(32).copy()}
    arrays["constant"] = np.full_like(arrays["right"], 0.25)
    arrays["nan"][7, 1, 2, 3] = np.nan
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    given = ["folded.onnx", "--out", "models/net/1", "--precision", "int8", "--input", "3x16x16", *options]
    assert run(["fold-and-export", *given]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert "Traceback" not in printed
    assert not Path("models").exists()


@pytest.mark.parametrize("fault", INT8_FAULTS)
def test_each_fault_of_the_file_fails_in_the_file_proof(int8_bundle: Bundle, tmp_path: Path, fault: str) -> None:
    copied = spoiled(int8_bundle, tmp_path, fault)
    stored = [read_model(path / MODEL_ONNX).graph.initializer for path in (int8_bundle.path, copied.path)]
    right, wrong = ([(item.name, item.data_type, list(item.dims)) for item in items] for items in stored)
    assert right == wrong  # only numbers differ, so that engines load the file
    report = verified(copied)
    assert "quantization" in {row.stage for row in report.failures}, fault


def test_a_changed_float_original_fails(int8_bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(int8_bundle, tmp_path / "net" / "1")
    assert verified(reseal(folder)).passed
    assert Bundle.open(folder).manifest.onnx["precision"] == "int8"
    (folder / MODEL_FLOAT32).unlink()
    report = verified(reseal(folder))
    assert {"file-proof", "quantization"} <= {row.stage for row in report.failures}


def test_saturating_kernels_fail_and_are_named(
    int8_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = writer.encode

    def saturate(self: OnnxRuntimeRunner, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = IntegerEmulator(self._file, SATURATING).evaluate(feeds)
        return {name: array.astype(np.float32) for name, array in outputs.items()}

    monkeypatch.setattr(
        writer, "encode", lambda weight, *, pair_safe, least, **_: plain(weight, pair_safe=False, least=least)
    )
    monkeypatch.setattr(OnnxRuntimeRunner, "_run", saturate)  # whatever this machine's kernels do
    result = fold_and_export(residual(), tmp_path / "net" / "1", request=REQUEST)
    assert result.bundle is None
    assert not (tmp_path / "net" / "1").exists()
    failed = {row.stage for row in result.verification.failures}
    assert {"quantization", "strict", "precision"} <= failed
    detected = {row.detected for row in result.verification.rows if row.stage == "precision" and row.subject == RUNTIME}
    assert detected == {"int8-saturating"}


def test_more_changed_labels_than_the_noise_explains_fail() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((2000, 10)) * 3
    errors = 0.05 * rng.standard_normal((300, 10))
    usual = expected + 0.05 * rng.standard_normal(expected.shape)
    worse = expected + 0.5 * rng.standard_normal(expected.shape)
    rows = [labels_row("x", "images", scores, expected, errors, allowed=None) for scores in (usual, worse)]
    assert [row.passed for row in rows if row is not None] == [True, False]
    allowed = [labels_row("x", "images", worse, expected, errors, allowed=share) for share in (0.5, 0.01)]
    assert [row.passed for row in allowed if row is not None] == [True, False]


@pytest.mark.parametrize(
    ("count", "mean", "expected"),
    [(0, 2.0, 1.0), (1, 1.0, 0.6321), (3, 2.0, 0.3233), (9, 2.0, 0.0002), (1, 0.0, 0.0), (0, 0.0, 1.0)],
)
def test_the_chance_of_as_many_changed_labels(count: int, mean: float, expected: float) -> None:
    """Poisson's tail, from a table. Two changed labels where 0.4 are expected may be chance."""
    assert _at_least(count, mean) == pytest.approx(expected, abs=5e-5)


def test_options_of_int8_alone_are_refused_without_it() -> None:
    for options in ({"calibrate": "none"}, {"target": "tensorrt"}, {"allow_flips": "1%"}, {"float_layers": ("a",)}):
        with pytest.raises(UsageError, match="is given without precision"):
            ExportRequest(**options)
    with pytest.raises(UsageError, match="is neither a percentage nor a fraction"):
        ExportRequest(precision="int8", allow_flips="many")
