"""Sources: a checkpoint, a run, a known network with weights, a user's factory with weights."""

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import randomise
from torch import nn
from weights_files import message, with_prefix
from weights_files import same as has_state

from bnexport.errors import ModelError, UsageError
from bnexport.loading.checkpoint import RUN_FILES, Checkpoint, load_checkpoint, save_checkpoint
from bnexport.loading.sources import KNOWN, build_known, checkpoint_of, load_source, load_weights
from bnexport.nn.lenet import bn_lenet

METADATA = {
    "network": {"source": "bn_lenet", "options": {"norm": "scratch", "in_channels": 3, "num_classes": 4}},
    "dataset": "digits",
    "labels": ["a", "b", "ç", "d"],
    "preprocessing": {"scale": 0.5},
    "training": {"epoch": 2, "epochs": 3},
    "recalibrated": True,
}


def lenet(seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(bn_lenet(**options), seed).eval()


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), seed)


def same(one: nn.Module, two: nn.Module) -> bool:
    return has_state(one, two.state_dict())


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, nn.Module]:
    network = lenet(norm="scratch", in_channels=3, num_classes=4)
    save_checkpoint(tmp_path / "model.safetensors", Checkpoint(network.state_dict(), METADATA))
    return tmp_path / "model.safetensors", network


# a checkpoint or a run


def test_a_checkpoint_brings_everything(checkpoint):
    file, network = checkpoint
    loaded = load_source(str(file))
    assert same(loaded.module, network)
    assert not any(module.training for module in loaded.module.modules())
    assert (loaded.name, loaded.network) == ("bn_lenet", METADATA["network"])
    assert (loaded.input_shape, loaded.dataset, loaded.labels) == ((3, 28, 28), "digits", ("a", "b", "ç", "d"))
    assert loaded.preprocessing == {"scale": 0.5}
    assert loaded.training == {"epoch": 2, "epochs": 3, "recalibrated": True}


def test_round_trip(checkpoint, tmp_path):
    first = load_source(str(checkpoint[0]))
    again = checkpoint_of(first)
    eps = {name: module.eps for name, module in first.module.named_modules() if hasattr(module, "eps")}
    assert again.metadata == {**METADATA, "eps": eps}
    save_checkpoint(tmp_path / "again.safetensors", again)
    second = load_source(str(tmp_path / "again.safetensors"))
    assert same(second.module, first.module)
    assert {**vars(second), "module": None} == {**vars(first), "module": None}


def test_round_trip_of_a_network_about_which_little_is_known(factory, tmp_path):
    save_checkpoint(tmp_path / "a", checkpoint_of(load_source(f"{factory}:make")))
    metadata = load_checkpoint(tmp_path / "a").metadata
    assert metadata == {
        "network": {"source": f"{factory}:make", "options": {}}, "dataset": None, "labels": None, "preprocessing": None,
        "training": {}, "recalibrated": False, "eps": {"1": 1e-5},
    }  # fmt: skip
    assert f"holds the weights of your own network {factory}:make, but not its code" in message(str(tmp_path / "a"))


@pytest.mark.parametrize("present", [RUN_FILES, RUN_FILES[:1], RUN_FILES[1:]])
def test_a_run_directory_stands_for_its_best_file(tmp_path, present):
    for number, name in enumerate(present):
        state = lenet(number).state_dict()
        metadata = {"network": {"source": "bn_lenet"}, "training": {"file": name}}
        save_checkpoint(tmp_path / name, Checkpoint(state, metadata))
    loaded = load_source(str(tmp_path))
    assert loaded.training["file"] == present[0]
    assert same(loaded.module, lenet(0))


def test_a_folder_without_a_checkpoint(tmp_path):
    assert message(str(tmp_path)).endswith(f"holds no {RUN_FILES[0]} or {RUN_FILES[1]}")


def test_a_checkpoint_takes_no_other_weights(checkpoint):
    assert "contains its own weights" in message(str(checkpoint[0]), checkpoint[0], UsageError)


def test_a_checkpoint_of_other_tensors(tmp_path):
    metadata = {"network": {"source": "bn_lenet", "options": {"num_classes": 4}}}
    save_checkpoint(tmp_path / "a", Checkpoint(lenet().state_dict(), metadata))
    assert "do not fit its network" in message(str(tmp_path / "a"))


@pytest.mark.parametrize("options", [{"foo": 1}, [1], {"in_channels": "x"}, {"num_classes": None}])
def test_a_checkpoint_with_foreign_options(tmp_path, options):
    metadata = {"network": {"source": "bn_lenet", "options": options}}
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(lenet().state_dict(), metadata))
    assert "bn_lenet can't be built with these options" in message(str(tmp_path / "a.safetensors"))
    assert "bn_lenet can't be built with these options" in message("bn_lenet", tmp_path / "a.safetensors")


def test_a_source_that_is_nothing():
    assert message("runs/nowhere") == "runs/nowhere does not exist"


# a known network with weights


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_network_needs_weights(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message(name) == f"{name} needs weights"
    assert "nowhere.pt does not exist" in message(name, tmp_path / "nowhere.pt")
    assert "is a folder" in message(name, tmp_path)


def plain(state: dict[str, torch.Tensor], path: Path) -> None:
    safetensors.torch.save_file(state, path)


def legacy(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


parallel = with_prefix("module.")
WEIGHTS = {
    "safetensors": ("w.safetensors", plain),
    "safetensors under another name": ("w.bin", plain),
    "torch": ("w.pt", torch.save),
    "torch under another name": ("w.safetensors", torch.save),
    "torch's older format": ("w.pth", legacy),
    "torch's older format under another name": ("w.safetensors", legacy),
    "under state_dict": ("w.pt", lambda s, path: torch.save({"epoch": 3, "state_dict": OrderedDict(s)}, path)),
    "under model": ("w.pt", lambda s, path: torch.save({"optimizer": {"lr": 0.1}, "model": s}, path)),
    "of DistributedDataParallel": ("w.pt", lambda s, path: torch.save(parallel(s), path)),
    "of DistributedDataParallel under state_dict": (
        "w.pt", lambda s, path: torch.save({"state_dict": parallel(s)}, path),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_kind_of_weights(tmp_path, factory, kind):
    name, write = WEIGHTS[kind]
    trained = small(3)
    write(trained.state_dict(), tmp_path / name)
    loaded = load_source(f"{factory}:make", weights=tmp_path / name)
    assert same(loaded.module, trained)
    assert not any(module.training for module in loaded.module.modules())


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_known_network_with_every_kind_of_weights(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    name, write = WEIGHTS[kind]
    trained = lenet(5)
    write(trained.state_dict(), tmp_path / name)
    loaded = load_source("bn_lenet", weights=tmp_path / name)
    assert same(loaded.module, trained)
    assert (loaded.input_shape, loaded.network) == ((1, 28, 28), {"source": "bn_lenet", "options": {}})


def test_a_known_network_with_a_checkpoint_has_its_options(checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded = load_source("bn_lenet", weights=checkpoint[0])
    assert same(loaded.module, checkpoint[1])
    assert loaded.network == METADATA["network"]
    assert loaded.input_shape == (3, 28, 28)


def test_a_zip_file_of_zip_weights_is_not_read_as_safetensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(lenet()), str(tmp_path / "model.pt"))
    assert "torch" in message("bn_lenet", tmp_path / "model.pt")


class Creates:
    """A value of an attacker: unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, legacy, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pkl"])
def test_code_in_a_weights_file_is_not_run(tmp_path, factory, write, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap, file = tmp_path / "trap", tmp_path / f"w{suffix}"
    write({**small().state_dict(), "x": Creates(trap)}, file)
    for source in (f"{factory}:make", "bn_lenet"):
        assert f"w{suffix}" in message(source, file)
        assert not trap.exists()
    pickle.loads(pickle.dumps(Creates(trap))).close()
    assert trap.exists()  # the trap itself works


BROKEN = {
    "empty": (b"", "is empty"),
    "text": (b"these are no weights\n" * 9, "w"),
    "text in braces": (b'\x01{"a": 1}' + b"{" * 99, "w"),
    "half a zip file": (b"PK\x03\x04" + b"\0" * 200, "w"),
    "a header without tensors": ((300).to_bytes(8, "little") + b"{}", "w"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_weights(tmp_path, factory, kind, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, expected = BROKEN[kind]
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    for source in (f"{factory}:make", "bn_lenet"):
        text = message(source, file)
        assert str(file) in text
        assert expected in text


def test_half_a_torch_file(tmp_path, factory):
    torch.save(small().state_dict(), tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:700])
    assert "w.pt" in message(f"{factory}:make", tmp_path / "w.pt")


def test_weights_of_another_network_are_listed(tmp_path, factory):
    plain(lenet().state_dict(), tmp_path / "w.safetensors")
    text = message(f"{factory}:make", tmp_path / "w.safetensors")
    assert "does not fit Sequential: 7 missing (0.bias, 0.weight, 1.bias, ...)" in text
    assert "30 unexpected (bn1.bias, bn1.num_batches_tracked, bn1.running_mean, ...) of 7 tensors" in text


def test_weights_of_another_shape_are_named(tmp_path):
    plain(lenet(num_classes=4).state_dict(), tmp_path / "w.safetensors")
    network = lenet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(network, tmp_path / "w.safetensors")
    assert "fc3.bias is 4 in the file and 10 in the network (2 tensors differ in shape)" in caught.value.message
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_lazy_layers_take_weights(factory, tmp_path):
    factory.write_text("from torch import nn\ndef make(): return nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4))\n")
    trained = small(2)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    assert same(load_source(f"{factory}:make", weights=tmp_path / "w.pt").module, trained)


def test_build_known():
    built = build_known({"source": "bn_lenet", "options": {"norm": "none", "num_classes": 3}})
    assert (built.fc3.out_features, hasattr(built, "bn1")) == (3, False)
    assert build_known({"source": "bn_lenet", "options": None}).fc3.out_features == 10
    for network in ({"source": "net.py:make"}, {}):
        with pytest.raises(ModelError, match=r"can't build .* without its code"):
            build_known(network)
