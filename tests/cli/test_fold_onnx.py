"""``bnexport fold-and-export model.onnx``: a file or a bundle, all of it or nothing."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper
from support.onnx_builder import Builder

from bnexport.bundle import GOLDEN, MODEL_ONNX, REPORT, Bundle
from bnexport.cli.fold_and_export import is_onnx
from bnexport.cli.main import run


def network(*, batch: int | str = "batch", size: int | str = 9, opset: int = 18, half: bool = False) -> ModelProto:
    g = Builder(opset=opset, dtype="float16" if half else "float32")
    y = g.bn(g.conv(g.input(batch, 3, 8, size), 3, 6), 6)
    y = g.bn(g.node("Sigmoid", y), 6, name="bn2")
    y = g.node("Flatten", g.node("GlobalAveragePool", g.node("Tanh", y)))
    y = g.node("Gemm", y, g.init("w", 6, 5), g.init("b", 5), outputs=("scores",))
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    g.outputs.append(helper.make_tensor_value_info(y, kind, [batch, 5]))
    return g.model()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path, name: str = "network.onnx", **options: object) -> Path:
    path = folder / name
    onnx.save(network(**options), path)  # type: ignore[arg-type]
    return path


def test_a_file(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "sub" / "folded.onnx"
    assert run(["fold-and-export", str(source), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 BatchNorm calls folded" in printed
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 9)).astype(np.float32)
    before, after = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for path in (source, out)
    )
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
    content = out.read_bytes()
    assert run(["fold-and-export", str(source), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(["fold-and-export", str(out), "--out", str(out), "--force"]) == 0
    assert "Nothing was changed" in capsys.readouterr().out
    assert out.read_bytes() == content
    assert sorted(item.name for item in out.parent.iterdir()) == ["folded.onnx"]


def test_a_file_as_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["fold-and-export", str(source), "--out", str(tmp_path / "o.onnx"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["changed"] is True
    assert [row["module"] for row in value["fold"]["rows"]] == ["bn", "bn2"]


@pytest.mark.parametrize(
    "opset", [pytest.param(9, marks=pytest.mark.slow), pytest.param(14, marks=pytest.mark.slow), 18]
)
def test_a_bundle(tmp_path: Path, opset: int, capsys: pytest.CaptureFixture[str]):
    source = written(tmp_path, opset=opset)
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    out = tmp_path / "models" / "net" / "1"
    arguments = ["--labels", str(tmp_path / "labels.txt"), "--input", "3x8x9"]
    assert run(["fold-and-export", str(source), "--out", str(out), *arguments]) == 0, capsys.readouterr()
    assert "PASS" in capsys.readouterr().out
    bundle = Bundle.open(out)
    assert bundle.problems() == []
    assert set(bundle.manifest.files) == {MODEL_ONNX, REPORT, f"{GOLDEN}/input_0.pb", f"{GOLDEN}/output_0.pb"}
    assert bundle.manifest.network["source"] == "network.onnx"
    assert bundle.manifest.onnx == {"opset": opset, "ir_version": 8, "precision": "float32"}
    assert bundle.manifest.labels == tuple("abcde")
    assert (out.parent / "config.pbtxt").is_file()
    assert run(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    "options", [{"batch": 1}, pytest.param({"batch": 20}, marks=pytest.mark.slow), {"size": "width"}]
)
def test_a_bundle_with_a_fixed_batch_or_a_varying_size(tmp_path: Path, options: dict[str, object]):
    source, out = written(tmp_path, **options), tmp_path / "net" / "1"
    assert run(["fold-and-export", str(source), "--out", str(out)]) == 0
    assert run(["verify", str(out)]) == 0


def test_golden_vectors_are_the_original_files(tmp_path: Path):
    source, out = written(tmp_path), tmp_path / "net" / "1"
    assert run(["fold-and-export", str(source), "--out", str(out)]) == 0
    inputs, outputs = Bundle.open(out).golden()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, inputs)[0], outputs["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "w.safetensors"], "--weights does not apply to"),
        (["--opset", "18"], "--opset does not apply to"),
        (["--ir-version", "8"], "--ir-version does not apply to"),
        (["--model-option", "a=1"], "--model-option does not apply to"),
        (["--dynamic-size"], "--dynamic-size does not apply to"),
        (["--allow-untrained"], "--allow-untrained does not apply to"),
        (["--format", "onnx", "--format", "torchscript"], "as ONNX only"),
        (["--input", "3x8x8"], "does not fit 'x'"),
        (["--input", "a=3x8x9", "--input", "b=3"], "the file has the inputs x"),
    ],
)
def test_options_that_make_no_sense(
    source: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert run(["fold-and-export", str(source), "--out", str(tmp_path / "net" / "1"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("arguments", [["--labels", "l.txt"], ["--mean", "1,1,1"], ["--format", "onnx"]])
def test_options_of_bundles_for_a_file(
    source: Path, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert run(["fold-and-export", str(source), "--out", str(tmp_path / "o.onnx"), *arguments]) == 2
    assert "applies to a bundle only" in capsys.readouterr().err


def test_half_precision_is_a_file_and_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = written(tmp_path, half=True)
    assert run(["fold-and-export", str(source), "--out", str(tmp_path / "net" / "1")]) == 2
    assert "half precision" in capsys.readouterr().err
    assert run(["fold-and-export", str(source), "--out", str(tmp_path / "o.onnx")]) == 0


def test_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "bad.onnx").write_text("no model")
    for name in ("bad.onnx", "missing.onnx"):
        assert run(["fold-and-export", str(tmp_path / name), "--out", str(tmp_path / "o.onnx")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 2
    assert not (tmp_path / "o.onnx").exists()


def test_an_onnx_file_is_known_by_its_content(source: Path, tmp_path: Path):
    other = tmp_path / "model.bin"
    other.write_bytes(source.read_bytes())
    assert is_onnx(str(other))
    (tmp_path / "w.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      ")
    assert not is_onnx(str(tmp_path / "w.safetensors"))
    assert not is_onnx("bn_lenet")
    assert not is_onnx(str(tmp_path))
