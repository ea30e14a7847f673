"""Files in the wrong place get their true names and a remedy: as a source, as weights, as an ONNX file."""

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from cases import randomise
from torch import nn

import bnexport
from bnexport.errors import ModelError
from bnexport.loading.sources import load_source
from bnexport.validation.file_kinds import KINDS, kind_of

NETWORK = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()


def torchscript(path: Path) -> None:
    torch.jit.trace(network(), torch.randn(1, 3, 8, 8)).save(str(path))


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(network(), (torch.randn(1, 3, 8, 8),)), io_bytes := io.BytesIO())
    path.write_bytes(io_bytes.getvalue())


def old_torch(path: Path) -> None:
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False)


def old_module(path: Path) -> None:
    torch.save({"model": network(), "ema": network()}, path, _use_new_zipfile_serialization=False)


def onnx_model(path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", 1, [1, 2])], [value("y", 1, [1, 2])]
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def ort_model(path: Path) -> None:
    onnx_model(path.with_name("for_ort.onnx"))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(path.with_name("for_ort.onnx")), options, providers=["CPUExecutionProvider"])


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))


def old_tar(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 102571313\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"
SHARDS = b'{"metadata": {"total_size": 9}, "weight_map": {"0.weight": "part-1.bin"}}'
#: Name -> how the file is made, its kind, words of the message, words of the remedy.
FILES: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "a state dict": (lambda p: torch.save(network().state_dict(), p), "torch", "file of torch.save", "--weights"),
    "a state dict in the old format": (old_torch, "torch", "file of torch.save", "--weights"),
    "a pickled module": (lambda p: torch.save(network(), p), "module", "pickled module", "weights_only=False"),
    "pickled modules in the old format": (old_module, "module", "pickled module", "weights_only=False"),
    "TorchScript": (torchscript, "torchscript", "TorchScript", "torch.jit.load"),
    "a .pt2 file": (exported, "pt2", "torch.export", "torch.export.load"),
    "safetensors": (lambda p: safetensors.torch.save_file(network().state_dict(), p), "safetensors", "weights", "--weights"),
    "an index": (lambda p: p.write_bytes(SHARDS), "index", "index of weights in several files", "--weights"),
    "ONNX": (onnx_model, "onnx", "ONNX model", "bnexport.fold_onnx"),
    ".ort": (ort_model, "ort", ".ort format", "Give the .onnx file"),
    "a Git LFS pointer": (lambda p: p.write_bytes(POINTER), "lfs", "Git LFS pointer", "git lfs pull"),
    "an HTML page": (lambda p: p.write_bytes(PAGE), "html", "HTML page", "Download the file itself"),
    "an empty file": (lambda p: p.touch(), "empty", "is empty", "again"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps({"w": np.ones(2)})), "pickle", "is a pickle", "torch.save"),
    "an archive of gzip": (lambda p: p.write_bytes(gzip.compress(b"x" * 99)), "gzip", "packed with gzip", "Unpack it"),
    "an archive of tar": (tar, "tar", "tar archive", "Unpack it"),
    "a tar archive of PyTorch": (old_tar, "old", "PyTorch before 0.1.10", "weights_only=False"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "hdf5", "HDF5 file", ".onnx"),
    "TensorFlow Lite": (lambda p: p.write_bytes(b"\x1c\0\0\0TFL3" + bytes(99)), "tflite", "TensorFlow Lite", ".onnx"),
}  # fmt: skip
AS_WEIGHTS = ("torch", "safetensors")


def test_every_kind_is_tried() -> None:
    assert {row[1] for row in FILES.values()} == {kind.name for kind in KINDS}


@pytest.mark.parametrize("ending", [".pt", ".onnx", ".safetensors"])
@pytest.mark.parametrize("name", FILES)
def test_every_wrong_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ending: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    make, kind, fact, remedy = FILES[name]
    file = Path(f"given{ending}")
    make(file)
    found = kind_of(file)
    assert found is not None
    assert found.name == kind
    places: dict[str, Callable[[], object]] = {"source": lambda: load_source(str(file))}
    if kind not in AS_WEIGHTS:
        places["weights"] = lambda: load_source("net.py:build", weights=file)
    if kind != "onnx":
        places["onnx"] = lambda: bnexport.fold_onnx(file)
    for place, read in places.items():
        with pytest.raises(ModelError) as caught:
            read()
        assert str(file) in caught.value.message
        if not (place == "weights" and kind == "index"):  # which then lacks its parts
            assert fact in caught.value.message, place
            assert "{" not in str(caught.value)
        if (place, kind) not in (("source", "safetensors"), ("weights", "index"), ("weights", "pickle")):
            assert remedy in caught.value.remedy, place
        assert "cut off" not in caught.value.message


def test_the_remedies_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line of Python that a remedy gives makes a file that is taken."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    for name in ("TorchScript", "a .pt2 file", "a pickled module"):
        FILES[name][0](Path("given"))
        found = kind_of(Path("given"))
        assert found is not None
        line = found.remedy[found.remedy.index("torch.save(") : found.remedy.index(", and give")]
        exec(line, {"torch": torch})
        module = load_source("net.py:build", weights="weights.pt").module
        assert all(torch.equal(value, network().state_dict()[key]) for key, value in module.state_dict().items())


def test_texts_and_damaged_files_have_no_kind(tmp_path: Path) -> None:
    for content in (b"some text\n" * 9, b"PK\x03\x04" + bytes(99), b"\x00" * 64, b'{"abcd":{"a": 1}}' * 9):
        (tmp_path / "x").write_bytes(content)
        assert kind_of(tmp_path / "x") is None
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "nowhere") is None
