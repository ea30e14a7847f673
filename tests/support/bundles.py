"""Small bundles made without bnexport's own folding and exporting, for the tests of verification.

The fold is a few lines of float64 arithmetic of this file, so that a fault in ``bnexport.folding`` can't hide here, and a
sabotage is one changed number in it.
"""

import copy
import functools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import numpy_helper
from torch import nn

from bnexport.bundle import (
    GOLDEN,
    MODEL_EXPORTED,
    MODEL_ONNX,
    MODEL_TORCHSCRIPT,
    WEIGHTS,
    Bundle,
    Manifest,
    seal,
    write_golden,
)

# By name: some tests replace bnexport.data.digits.training_set, and network() is cached for all.
from bnexport.data.digits import training_set
from bnexport.data.preprocessing import Preprocessing
from bnexport.nn.lenet import bn_lenet
from bnexport.tensors import Signature, TensorSpec
from bnexport.tuned import Choice, Tuning, write_tuning

SIGNATURE = Signature(
    (TensorSpec("input", "float32", ("batch", 1, 28, 28)),), (TensorSpec("logits", "float32", ("batch", 10)),)
)
#: BatchNorm -> the layer that absorbs it.
PAIRS = (("bn1", "conv1"), ("bn2", "conv2"), ("bn3", "fc1"), ("bn4", "fc2"))
Affine = Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]]


def exact_affine(bn: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a BatchNorm in eval mode, float64."""
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    return scale, bn.bias.double() - scale * bn.running_mean.double()


def fold_by_hand(network: nn.Module, affine: Affine = exact_affine) -> dict[str, torch.Tensor]:
    """State dict of the network without its norms, float32, folded in float64."""
    state = {}
    with torch.no_grad():
        for bn_name, layer_name in PAIRS:
            layer = network.get_submodule(layer_name)
            scale, shift = affine(network.get_submodule(bn_name))
            weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
            state[f"{layer_name}.weight"] = weight.float()
            state[f"{layer_name}.bias"] = (layer.bias.double() * scale + shift).float()
        state["fc3.weight"], state["fc3.bias"] = network.fc3.weight.clone(), network.fc3.bias.clone()
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


@functools.cache
def network() -> nn.Module:
    """A bn_lenet in eval mode with random statistics in every channel, whose last layer reads the digits set."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    model = bn_lenet()
    with torch.no_grad():
        for name, _ in PAIRS:
            bn = model.get_submodule(name)
            bn.weight.copy_(torch.randn(bn.num_features, generator=generator) + 0.3)
            bn.weight[0] = 0.0
            bn.bias.copy_(torch.randn(bn.num_features, generator=generator))
            bn.running_mean.copy_(torch.randn(bn.num_features, generator=generator) * 0.5)
            bn.running_var.copy_(torch.exp(torch.randn(bn.num_features, generator=generator)))
            bn.running_var[1], bn.running_var[2] = 1e-3, 50.0
            bn.num_batches_tracked.fill_(100)
    model.eval()
    _read_digits(model)
    return model


def exact_answer(x: np.ndarray) -> np.ndarray:
    """The logits of the network in float64."""
    with torch.no_grad():
        return np.asarray(copy.deepcopy(network()).double()(torch.from_numpy(x).double()).numpy())


def _read_digits(model: nn.Module) -> None:
    """Least squares for the last layer: enough for an accuracy that depends on the preprocessing."""
    digits, labels = training_set()
    images = torch.from_numpy(Preprocessing().apply(digits))
    with torch.no_grad():
        # In float64, so that the weights do not depend on the float32 kernels of this machine's processor.
        features = copy.deepcopy(nn.Sequential(*list(model.children())[:-1])).double()(images.double())
        wide = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
        targets = nn.functional.one_hot(torch.from_numpy(labels), 10).double() * 10
        gram = wide.T @ wide + 3.0 * torch.eye(wide.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(gram, wide.T @ targets)
        model.fc3.weight.copy_(solution[:-1].T)
        model.fc3.bias.copy_(solution[-1])


@functools.cache
def _exported() -> bytes:
    """The folded network as ONNX; its initializers carry the state dict's names."""
    plain = bn_lenet("none")
    plain.load_state_dict(fold_by_hand(network()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            plain.eval(),
            (torch.zeros(2, 1, 28, 28),),
            str(file),
            dynamo=True,
            opset_version=18,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
        model = onnx.load(file)
    model.ir_version = 8
    return model.SerializeToString()


def write_onnx(file: Path, state: Mapping[str, torch.Tensor]) -> None:
    model = onnx.load_model_from_string(_exported())
    for tensor in model.graph.initializer:
        if tensor.name in state:
            tensor.CopyFrom(numpy_helper.from_array(state[tensor.name].numpy(), tensor.name))
    file.write_bytes(model.SerializeToString())


def write_torchscript(file: Path, state: Mapping[str, torch.Tensor]) -> None:
    plain = bn_lenet("none")
    plain.load_state_dict(dict(state))
    traced = torch.jit.trace(plain.eval(), torch.zeros(2, 1, 28, 28), check_trace=False)
    torch.jit.save(torch.jit.freeze(traced), str(file))


def write_exported(file: Path, state: Mapping[str, torch.Tensor]) -> None:
    plain = bn_lenet("none")
    plain.load_state_dict(dict(state))
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11 warns of classes that it uses itself
        program = torch.export.export(plain.eval(), (torch.zeros(2, 1, 28, 28),), dynamic_shapes=({0: batch},))
        torch.export.save(program, str(file))


def write_bundle(folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> Bundle:
    """Create a folder with a sealed bundle of ``network()``; ``state``: other folded weights for the model files."""
    folder.mkdir(parents=True)
    model = network()
    folded = fold_by_hand(model) if state is None else state
    write_onnx(folder / MODEL_ONNX, folded)
    write_torchscript(folder / MODEL_TORCHSCRIPT, folded)
    write_exported(folder / MODEL_EXPORTED, folded)
    safetensors.torch.save_file(model.state_dict(), folder / WEIGHTS)
    golden = np.random.default_rng(5).random((3, 1, 28, 28), dtype=np.float32)
    write_golden(folder, SIGNATURE, {"input": golden}, {"logits": exact_answer(golden)})
    return seal(folder, manifest())


def manifest() -> Manifest:
    return Manifest(
        "bn_lenet",
        1,
        SIGNATURE,
        {"source": "bn_lenet", "options": {}},
        dataset="digits",
        preprocessing=Preprocessing().to_json(),
        labels=tuple("0123456789"),
        onnx={"opset": 18, "ir_version": 8},
    )


def pixel_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Seal a bundle of ``network()`` whose model.onnx takes uint8 pixels; its golden answers are the original network's."""
    from bnexport.folding.pixel_input import pixel_model

    folder.mkdir(parents=True)
    image = Preprocessing()
    model = pixel_model(onnx.load(bundle.path / MODEL_ONNX), image, {})
    (folder / MODEL_ONNX).write_bytes(model.SerializeToString())
    signature = Signature((replace(SIGNATURE.inputs[0], dtype="uint8"),), SIGNATURE.outputs)
    golden = np.random.default_rng(5).integers(0, 256, (3, 28, 28), np.uint8)
    write_golden(folder, signature, {"input": golden[:, None]}, {"logits": exact_answer(image.apply(golden))})
    facts = {**manifest().onnx, "input_type": "uint8"}
    return seal(folder, replace(manifest(), signature=signature, onnx=facts))


def copy_bundle(bundle: Bundle, folder: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(bundle.path, folder)
    return folder


def tuned_copy(bundle: Bundle, folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> Bundle:
    """A copy with a tuning of this machine for the highest throughput; the machine has as many cores as that needs."""
    patch.setattr("bnexport.tuned.available_cores", lambda: 6)
    mine = Bundle.open(copy_bundle(bundle, folder))
    choice = replace(Choice("onnxruntime-cpu", 32, 2, 3, 0.3, 9e4, 20.0), **changes)
    write_tuning(mine.path, Tuning.here(mine, {"throughput": choice}))
    return mine


def flip_bit(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def reseal(folder: Path, **changes: object) -> Bundle:
    """Seal a spoiled bundle again, so that its hashes hold and the other stages have to find the fault."""
    return seal(folder, replace(Bundle.open(folder).manifest, **changes))


def another(models: Path, folder: Path, version: int, factor: float = 1.0) -> Path:
    """A copy of the bundle as another version, whose answers and golden answers are ``factor`` times as large."""
    shutil.copytree(models / "bn_lenet" / "1", folder)
    if factor != 1.0:
        state = fold_by_hand(network())
        state |= {name: state[name] * factor for name in ("fc3.weight", "fc3.bias")}
        write_onnx(folder / MODEL_ONNX, state)
        file = folder / GOLDEN / "output_0.pb"
        proto = onnx.TensorProto.FromString(file.read_bytes())
        scaled = numpy_helper.from_array(numpy_helper.to_array(proto) * np.float32(factor), proto.name)
        file.write_bytes(scaled.SerializeToString())
    reseal(folder, version=version)
    return folder
