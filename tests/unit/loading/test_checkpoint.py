import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from bnexport.errors import ModelError, OutputError
from bnexport.loading.checkpoint import (
    FORMAT,
    Checkpoint,
    load_checkpoint,
    read_arrays,
    read_safetensors,
    save_checkpoint,
)
from bnexport.nn.lenet import bn_lenet

NETWORK = {"source": "bn_lenet", "options": {"norm": "torch"}}
METADATA = {"network": NETWORK, "labels": ["é", "b"], "recalibrated": False}


def test_round_trip(tmp_path):
    network = bn_lenet()
    file = tmp_path / "deep" / "model.safetensors"
    save_checkpoint(file, Checkpoint(network.state_dict(), METADATA))
    loaded = load_checkpoint(file)
    assert loaded.metadata == METADATA
    assert set(loaded.state) == set(network.state_dict())
    assert all(torch.equal(value, loaded.state[name]) for name, value in network.state_dict().items())
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_the_bytes_depend_on_the_content_alone(tmp_path):
    state = bn_lenet().state_dict()
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, Checkpoint(state, METADATA))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tied_weights_are_written(tmp_path):
    value = torch.arange(3.0)
    save_checkpoint(tmp_path / "a", Checkpoint({"x": value, "y": value, "z": value[::2]}, METADATA))
    assert load_checkpoint(tmp_path / "a").state["z"].tolist() == [0.0, 2.0]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_checkpoint(file, Checkpoint({"x": torch.ones(1)}, METADATA))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(file, Checkpoint({"x": torch.zeros(1)}, METADATA))
    assert load_checkpoint(file).state["x"].item() == 1.0
    assert len(list(tmp_path.iterdir())) == 1


def content_of(metadata):
    return safetensors.torch.save({"x": torch.ones(100)}, metadata={"bnexport": metadata})


WHOLE = content_of(json.dumps(METADATA))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"loss 0.27, train acc 0.90\n" * 20, "not a complete safetensors file"),
        (b"\x80", "not a complete safetensors file"),
        (WHOLE[:-10], "not a complete safetensors file"),
        (WHOLE[:50], "not a complete safetensors file"),
        (pickle.dumps({"x": 1}), "not a complete safetensors file"),
        (safetensors.torch.save({"x": torch.ones(1)}), "no bnexport metadata"),
        (content_of("{"), "can't be read"),
        (content_of("[]"), "contain no network"),
        (content_of("{}"), "contain no network"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_one_sentence(tmp_path, content, message):
    file = tmp_path / "model.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_folder(tmp_path):
    with pytest.raises(ModelError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_foreign_safetensors_are_read_as_weights(tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(safetensors.torch.save({"x": torch.ones(2)}, metadata={"format": "pt"}))
    state, metadata = read_safetensors(file)
    assert state["x"].tolist() == [1.0, 1.0]
    assert metadata == {"format": "pt"}


def test_arrays_are_read_without_torch_and_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    state = {kind: torch.tensor([[-1.5, 0.0, 3.0]]).to(getattr(torch, kind)) for kind in kinds}
    state |= {"number": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    content = safetensors.torch.save({**state, "odd": torch.ones(2).to(torch.float8_e4m3fn)}, metadata={"a": "b"})
    (tmp_path / "x.safetensors").write_bytes(content)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    arrays, metadata = read_arrays(tmp_path / "x.safetensors")
    assert metadata == {"a": "b"}
    assert set(arrays) == set(state)  # numpy has no 8-bit floats
    for name, tensor in state.items():
        want = tensor.float().numpy() if name == "bfloat16" else tensor.numpy()
        assert (arrays[name].dtype, arrays[name].shape) == (want.dtype, want.shape)
        assert np.array_equal(arrays[name], want)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"{}"])
def test_arrays_of_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.safetensors"):
        read_arrays(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("number", "message"),
    [(FORMAT + 1, f"has format {FORMAT + 1}, but this bnexport reads formats up to {FORMAT}"), ("x", "'x'"), (0, "0")],
)
def test_the_format_is_numbered_and_a_newer_one_refused(tmp_path, number, message):
    file = tmp_path / "a"
    save_checkpoint(file, Checkpoint({"x": torch.ones(1)}, METADATA))
    assert json.loads(read_safetensors(file)[1]["bnexport"])["format"] == FORMAT
    save_checkpoint(file, Checkpoint({"x": torch.ones(1)}, {**METADATA, "format": number}))
    with pytest.raises(ModelError, match=message):
        load_checkpoint(file)


def test_a_file_from_before_formats_were_numbered(tmp_path):
    (tmp_path / "a").write_bytes(WHOLE)
    assert load_checkpoint(tmp_path / "a").metadata == METADATA
