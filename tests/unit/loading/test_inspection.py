from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import randomise
from support.bundles import flip_bit, reseal
from torch import nn

from bnexport.bundle import WEIGHTS, Manifest, seal
from bnexport.errors import BundleError, ModelError
from bnexport.loading.checkpoint import Checkpoint, save_checkpoint
from bnexport.loading.inspection import inspect_path
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.statistics import eps_of, layer_statistics
from bnexport.tensors import Signature, TensorSpec

NAMES = ["bn1", "bn2", "bn3", "bn4"]
KNOWN = {"network": {"source": "bn_lenet", "options": {"norm": "torch"}}}
SPEC = TensorSpec("x", "float32", ("batch",))


def lenet() -> nn.Module:
    """Return randomised statistics with the eps of a fresh network, which a checkpoint's name and options rebuild."""
    network = randomise(bn_lenet())
    for module in network:
        if hasattr(module, "eps"):
            module.eps = 1e-5
    return network


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    save_checkpoint(folder / WEIGHTS, Checkpoint(lenet().state_dict(), KNOWN))
    seal(folder, Manifest("x", 1, Signature((SPEC,), (SPEC,)), KNOWN["network"]))
    return folder


def test_a_checkpoint_and_its_run(tmp_path):
    file = tmp_path / "model.safetensors"
    save_checkpoint(file, Checkpoint(lenet().state_dict(), KNOWN))
    for path in (file, tmp_path):
        found = inspect_path(path)
        assert (found.file, found.note) == (file, "")
        assert list(found.layers) == layer_statistics(lenet().state_dict())
        assert [layer.name for layer in found.layers] == NAMES


def test_of_plain_weights_and_a_user_s_network_eps_is_assumed(tmp_path):
    state = randomise(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))).state_dict()
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    save_checkpoint(tmp_path / "user.safetensors", Checkpoint(state, {"network": {"source": "net.py:make"}}))
    for name in ("plain", "user"):
        found = inspect_path(tmp_path / f"{name}.safetensors")
        assert [layer.name for layer in found.layers] == ["1"]
        assert found.note.startswith("eps is not in this file: 1e-05 is assumed; the layers are sorted by name")


def test_eps_and_order_are_those_that_a_checkpoint_states(tmp_path):
    layers = {name: nn.BatchNorm2d(3, eps=eps) for name, eps in (("stem", 1e-3), ("block10", 1e-2), ("block9", 0.5))}
    network = randomise(nn.ModuleDict(layers))
    stated = {name: layer.eps for name, layer in network.items()}
    file = tmp_path / "user.safetensors"
    facts = {"network": {"source": "net.py:make"}, "eps": eps_of(network)}
    save_checkpoint(file, Checkpoint(network.state_dict(), facts))
    found = inspect_path(file)
    assert {layer.name: layer.eps for layer in found.layers} == stated
    assert [layer.name for layer in found.layers] == list(layers)
    assert found.note == ""
    for odd in ({"stem": "x"}, {"stem": True}, [1], {}):
        save_checkpoint(file, Checkpoint(network.state_dict(), {**facts, "eps": odd}))
        assert "1e-05 is assumed" in inspect_path(file).note


def test_layers_are_in_order(tmp_path):
    names = ["features.9.bn", "features.10.bn", "features.100.bn", "neck.bn", "neck.bn2"]
    for _ in range(3):  # safetensors gives another order each time
        state = {f"{n}.running_{kind}": torch.ones(2) for n in names for kind in ("mean", "var")}
        safetensors.torch.save_file(state, tmp_path / "a.safetensors")
        assert [layer.name for layer in inspect_path(tmp_path / "a.safetensors").layers] == names


def test_a_bundle(bundle):
    found = inspect_path(bundle)
    assert found.file == bundle / WEIGHTS
    assert list(found.layers) == layer_statistics(lenet().state_dict())


def test_a_users_bundle_has_the_order_of_its_fold_report(bundle):
    """The names are in the wrong order alphabetically, and only the fold report has the network's order."""
    names = ["stem", "block10", "block9", "classifier"]
    state = {f"{n}.running_{kind}": torch.ones(2) for n in sorted(names) for kind in ("mean", "var")}
    safetensors.torch.save_file(state, bundle / WEIGHTS)
    reseal(bundle, fold={"rows": [{"module": name} for name in names]})
    assert [layer.name for layer in inspect_path(bundle).layers] == names
    for odd in ({"rows": 3}, {"rows": [1]}, {}):
        reseal(bundle, fold=odd)
        found = inspect_path(bundle)
        assert [layer.name for layer in found.layers] == ["block9", "block10", "classifier", "stem"]
        assert "sorted by name" in found.note


@pytest.mark.parametrize(("spoil", "message"), [(flip_bit, "was changed"), (Path.unlink, "is missing")])
def test_a_bundle_with_changed_or_without_weights_is_refused(bundle, spoil, message):
    spoil(bundle / WEIGHTS)
    with pytest.raises(BundleError, match=message):
        inspect_path(bundle)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        (".", "holds no model"),
        ("t", "not a complete"),
        ("a.pt", r"a\.pt is a file of torch\.save, which is inspected only with the code"),
        ("a.safetensors", r"a\.safetensors holds no BatchNorm"),
    ],
)
def test_files_that_can_not_be_read(tmp_path, name, message):
    (tmp_path / "t").write_text("text " * 9)
    torch.save({"bn.weight": torch.ones(2)}, tmp_path / "a.pt")
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=message):
        inspect_path(tmp_path / name)
