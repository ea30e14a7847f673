"""``bnexport fold``: folded weights as one file, whole or absent."""

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from cases import randomise

import bnexport
from bnexport.cli.main import run
from bnexport.errors import OutputError, ProofError
from bnexport.exporting.export_request import ExportRequest
from bnexport.folding import module_fold
from bnexport.loading.sources import call_factory
from bnexport.nn.folded import MARKER
from bnexport.pipeline import fold_weights

NETWORK = """
from torch import nn

def build(width=6):
    return nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 1))

def plain():
    return nn.Sequential(nn.Conv2d(3, 6, 3))

def sized():
    class Sized(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.shape[-1] == 8 else self[0](x)
    return Sized(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
"""
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "network.py").write_text(NETWORK)
    return f"{tmp_path}/network.py:build"


@pytest.fixture
def weights(source: str, tmp_path: Path) -> Path:
    return saved(source, tmp_path)


def saved(source: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = randomise(call_factory(source, {}))
    torch.save(model.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def fold(source: str, weights: Path, *more: str) -> int:
    return run(["fold", source, "--weights", str(weights), "--input", "3x8x8", *more])


def test_a_file_that_loads_again(
    source: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folded.safetensors"
    assert fold(source, weights, "--out", str(out)) == 0
    assert "1 of 1 BatchNorm call folded" in capsys.readouterr().out
    tensors = safetensors.torch.load_file(out)
    assert set(tensors) == {"0.weight", "0.bias", "3.weight", "3.bias", MARKER}
    assert bnexport.is_folded(tensors)
    model = call_factory(source, {})
    model.load_state_dict(torch.load(weights, weights_only=True))
    restored = bnexport.load_folded(model, tensors).eval()
    expected = model.eval()(X)
    assert (restored(X) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with safetensors.safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()[MARKER])
    assert facts["network"]["source"] == source
    assert facts["fold"]["rows"][0]["outcome"] == "backward"


def test_the_weights_option_refuses_folded_weights(
    source: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folded.safetensors"
    assert fold(source, weights, "--out", str(out)) == 0
    parallel = tmp_path / "parallel.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in safetensors.torch.load_file(out).items()}}, parallel)
    capsys.readouterr()
    for folded in (out, parallel):
        for words in (
            ["fold", source, "--out", str(tmp_path / "again.safetensors")],
            ["fold-and-export", source, "--out", str(tmp_path / "models/m/1")],
        ):
            assert run([*words, "--weights", str(folded), "--input", "3x8x8"]) == 2
            error = capsys.readouterr().err
            assert "holds folded weights" in error
            assert "load_folded" in error
    files = sorted(item.suffix for item in tmp_path.iterdir() if item.is_file())
    assert files == [".pth", ".pth", ".py", ".safetensors"]


def test_json_and_options(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sub" / "folded.safetensors"
    words = ["fold", source, "--input", "3x8x8", "--model-option", "width=8", "--allow-untrained", "--out", str(out)]
    assert run([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] == str(out)
    assert printed["fold"]["rows"][0]["channels"] == 8


def test_a_network_without_batch_norm(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = source.replace(":build", ":plain")
    out = tmp_path / "folded.safetensors"
    assert fold(plain, saved(plain, tmp_path), "--out", str(out)) == 0
    assert "Nothing was folded" in capsys.readouterr().out
    assert not bnexport.is_folded(safetensors.torch.load_file(out))


def test_bad_input(source: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folded.safetensors"
    for more, message in (
        (["--out", str(tmp_path / "folded.pth")], "is not named .safetensors"),
        (["--out", str(tmp_path)], "is not named .safetensors"),
    ):
        assert fold(source, weights, *more) == 2
        assert message in capsys.readouterr().err
    assert run(["fold", source, "--input", "3x8x8", "--out", str(out)]) == 2
    assert "never trained" in capsys.readouterr().err
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08")
    assert run(["fold", str(tmp_path / "net.onnx"), "--out", str(out)]) == 2
    assert "fold-and-export" in capsys.readouterr().err
    assert not out.exists()
    assert fold(source, weights, "--out", str(out)) == 0
    content = out.read_bytes()
    assert fold(source, weights, "--out", str(out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert fold(source, weights, "--out", str(out), "--force") == 0
    assert out.read_bytes() == content


def test_the_weights_that_are_read_are_never_replaced(source: str, tmp_path: Path) -> None:
    model = randomise(call_factory(source, {}))
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    content = file.read_bytes()
    assert fold(source, file, "--out", str(file), "--force") == 2
    assert file.read_bytes() == content


def test_a_failed_proof_writes_nothing(
    source: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folded.safetensors"

    def failed(*_: object) -> None:
        raise ProofError("the folded network differs", remedy="Report it")

    monkeypatch.setattr(module_fold, "_proved", failed)
    assert fold(source, weights, "--out", str(out)) == 1
    assert "differs" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.undo()
    sized = source.replace(":build", ":sized")
    assert fold(sized, saved(sized, tmp_path), "--out", str(out)) == 1
    assert "another size" in capsys.readouterr().err
    assert not out.exists()


def test_from_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(bnexport.bn_lenet())
    request = ExportRequest(inputs=("1x28x28",))
    result = fold_weights(model, tmp_path / "lenet.safetensors", request=request)
    assert all(row.gone for row in result.report.rows)
    with pytest.raises(OutputError):
        fold_weights(model, tmp_path / "lenet.safetensors", request=request)
