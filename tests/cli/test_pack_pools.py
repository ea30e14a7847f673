"""``fold-and-export --pack-pools``: a network and an ONNX file, both verified; where it does not apply, one sentence."""

from pathlib import Path

import onnx
import pytest
from cli.test_fold_onnx import written

from bnexport.bundle import MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle
from bnexport.cli.main import run

REFERENCE = Path(__file__).parents[2] / "models" / "bn_lenet" / "1"


def export(source: Path, out: Path, *more: str) -> int:
    return run(["fold-and-export", str(source), "--out", str(out), "--pack-pools", "--quiet", *more])


@pytest.mark.parametrize(
    ("file", "options"),
    [("weights.safetensors", ()), (MODEL_ONNX, ()), ("weights.safetensors", ("--input-type", "uint8"))],
)
def test_a_bundle_is_packed_and_passes(
    file: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed" / "1"
    assert export(REFERENCE / file, out, *options) == 0
    bundle = Bundle.open(out)
    bundle.check()
    assert MODEL_TORCHSCRIPT not in bundle.manifest.files
    model = onnx.load(bundle.file(MODEL_ONNX))
    assert [node.op_type for node in model.graph.node if node.op_type in ("Conv", "AveragePool")] == [
        "Conv", "Conv", "Conv", "AveragePool",
    ]  # fmt: skip
    assert bundle.manifest.verification["passed"] is True
    assert bundle.manifest.onnx["packed_pools"] == 1
    assert "model.onnx: 1 average pool packed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--precision", "int8"), "--pack-pools is for float files, and --precision int8 is given."),
        ((), "--pack-pools finds no average pooling that it can pack"),
    ],
)
def test_where_it_does_not_apply(
    options: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(written(tmp_path), tmp_path / "packed" / "1", *options) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("option", [("--pack-pools",), ("--precision", "int8")])
def test_formats_that_would_not_be_written_are_refused(
    option: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fold-and-export", str(REFERENCE / "weights.safetensors"), "--out", str(tmp_path / "a" / "1"), *option]
    assert run([*words, "--format", "onnx", "--format", "torchscript"]) == 2
    assert f"{' '.join(option)} writes model.onnx alone, and --format torchscript is given" in capsys.readouterr().err


def test_a_single_file_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(written(tmp_path), tmp_path / "packed.onnx") == 2
    assert "--pack-pools applies to a bundle only" in capsys.readouterr().err
