"""int8 bundles: the good one passes, each fault of its file fails in the file proof, and saturating kernels are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.bundles import copy_bundle, reseal
from support.int8 import PIXELS, residual
from support.shared import made_once

from bnexport.bundle import MODEL_EXPORTED, MODEL_FLOAT32, MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle
from bnexport.errors import UsageError
from bnexport.exporting.request import ExportRequest
from bnexport.pipeline import fold_and_export
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.replay import replay_golden
from bnexport.verification.int8 import labels_row
from bnexport.verification.scope import Scope
from bnexport.verification.self_test.copies import Copy, FaultTarget
from bnexport.verification.self_test.faults import INT8_FAULTS, spoil_int8
from bnexport.verification.verdict import VerificationReport
from bnexport.verification.verify import verify

RUNTIME = "onnxruntime-cpu"


def export(folder: Path) -> None:
    request = ExportRequest(precision="int8", inputs=("3x16x16",), mean=PIXELS["mean"], std=PIXELS["std"])
    result = fold_and_export(residual(), folder / "net" / "1", request=request)
    assert result.bundle is not None, result.verification.failures


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(made_once(tmp_path_factory, "int8", export) / "net" / "1")


def verified(bundle: Bundle) -> VerificationReport:
    return verify(bundle, module=residual(), runtimes=[RUNTIME], scope=Scope(max_samples=16, drift=False))


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


def test_the_bundle_is_replayed_as_a_server_does(int8_bundle: Bundle) -> None:
    with runner_spec(RUNTIME).open(int8_bundle) as runner:
        replayed = replay_golden(runner, int8_bundle)
    assert 0 < replayed.error <= replayed.bound


@pytest.mark.parametrize("fault", INT8_FAULTS)
def test_each_fault_of_the_file_fails_in_the_file_proof(int8_bundle: Bundle, tmp_path: Path, fault: str) -> None:
    copy = Copy(FaultTarget(int8_bundle, residual(), 1e-6, {}), copy_bundle(int8_bundle, tmp_path / "net" / "1"))
    spoil_int8(INT8_FAULTS[fault])(copy)
    report = verified(Bundle.open(copy.folder))
    assert "quantization" in {row.stage for row in report.failures}, fault


def test_a_changed_float_original_fails(int8_bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(int8_bundle, tmp_path / "net" / "1")
    content = bytearray((folder / MODEL_FLOAT32).read_bytes())
    (folder / MODEL_FLOAT32).write_bytes(content)
    assert verified(reseal(folder)).passed
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["onnx"]["precision"] == "int8"
    (folder / MODEL_FLOAT32).unlink()
    report = verified(reseal(folder))
    assert {"file-proof", "quantization"} <= {row.stage for row in report.failures}


def test_saturating_kernels_fail_and_are_named(
    int8_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnexport.quantization import writer
    from bnexport.quantization.integer_emulation import SATURATING, IntegerEmulator
    from bnexport.runtimes import onnxruntime

    plain = writer.encode
    monkeypatch.setattr(
        writer, "encode", lambda weight, *, pair_safe, least: plain(weight, pair_safe=False, least=least)
    )
    monkeypatch.setattr(  # whatever this machine's kernels do, these saturate
        onnxruntime.OnnxRuntimeRunner,
        "_run",
        lambda self, feeds: {
            name: array.astype(np.float32)
            for name, array in IntegerEmulator(self._file, SATURATING).evaluate(feeds).items()
        },
    )
    request = ExportRequest(precision="int8", inputs=("3x16x16",), mean=PIXELS["mean"], std=PIXELS["std"])
    result = fold_and_export(residual(), tmp_path / "net" / "1", request=request)
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


def test_options_of_int8_alone_are_refused_without_it() -> None:
    for options in ({"calibrate": "none"}, {"target": "tensorrt"}, {"allow_flips": "1%"}, {"float_layers": ("a",)}):
        with pytest.raises(UsageError, match="is given without precision"):
            ExportRequest(**options)
    with pytest.raises(UsageError, match="is not a share"):
        ExportRequest(precision="int8", allow_flips="many")
