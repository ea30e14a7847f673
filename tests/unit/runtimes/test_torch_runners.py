from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.bundles import copy_bundle, network, reseal
from torch import nn

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.errors import BundleError, ModelError, RuntimeUnavailable
from bnexport.runtimes import torch_outputs
from bnexport.runtimes.torch_runners import (
    ExportedProgramRunner,
    TorchEagerRunner,
    TorchScriptRunner,
    open_bundle,
    original_network,
)
from bnexport.tensors import Signature, TensorSpec

X = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)


class Many(nn.Module):
    """Takes two inputs, gives a dict with a tuple in it, and writes into its first input."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, object]:
        a += 1
        return {"first": a * 2, "rest": (a + b, [b])}


TWO = Signature(
    (TensorSpec("a", "float32", ("batch", 3)), TensorSpec("b", "float32", ("batch", 3))),
    tuple(TensorSpec(name, "float32", ("batch", 3)) for name in ("p", "q", "r")),
)


def test_nested_outputs_keep_their_order_and_the_feeds_stay_as_they_are() -> None:
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 5, np.float32)
    a.flags.writeable = False
    with TorchEagerRunner(Many(), TWO) as runner:
        outputs = runner.run({"b": b, "a": a})
    assert [float(outputs[name][0, 0]) for name in "pqr"] == [4, 7, 5]
    assert a.max() == 1


def test_too_few_outputs_are_named() -> None:
    with pytest.raises(BundleError, match="no output 's'"):
        TorchEagerRunner(Many(), Signature(TWO.inputs, (*TWO.outputs, TensorSpec("s", "float32", ("batch", 3)))))


def test_the_users_module_is_never_changed(bundle: Bundle) -> None:
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with TorchEagerRunner(module, bundle.manifest.signature) as runner:
        one = runner.run({"input": X[:1]})["logits"]  # a batch of one fails in training mode
        np.testing.assert_allclose(runner.run({"input": X})["logits"][:1], one, rtol=1e-5, atol=1e-6)
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_bn_lenet_is_rebuilt_from_the_weights(bundle: Bundle) -> None:
    with open_bundle(bundle) as runner:
        mine = runner.run({"input": X})["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(mine, network()(torch.from_numpy(X)).numpy(), rtol=1e-5, atol=1e-5)


def test_weights_of_another_network_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    safetensors.torch.save_file({"fc.weight": torch.ones(2, 2)}, folder / WEIGHTS)
    with pytest.raises(ModelError, match="does not fit"):
        original_network(reseal(folder))
    (folder / WEIGHTS).write_text("not weights")
    with pytest.raises(ModelError):
        original_network(reseal(folder))


def test_a_users_network_is_required(bundle: Bundle) -> None:
    foreign = Bundle(bundle.path, replace(bundle.manifest, network={"source": "mine.py:net"}))
    with pytest.raises(RuntimeUnavailable, match=r"mine\.py:net"):
        open_bundle(foreign)
    with open_bundle(foreign, module=network()) as runner:
        assert runner.run({"input": X})["logits"].shape == (5, 10)


def test_float32_is_strict_inside_and_the_settings_come_back(bundle: Bundle) -> None:
    seen = []

    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return x.flatten(1)[:, :10]

    before = torch.backends.cuda.matmul.fp32_precision
    with TorchEagerRunner(Look(), bundle.manifest.signature) as runner:
        runner.run({"input": X})
    assert set(seen) == {"ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == before


#: Runner -> the file that it opens, and the words of the refusal of another kind of file.
READERS = {
    TorchScriptRunner: (MODEL_TORCHSCRIPT, "is not a TorchScript file"),
    ExportedProgramRunner: (MODEL_EXPORTED, r"is not a file of torch\.export"),
}


@pytest.mark.parametrize("runner", READERS)
@pytest.mark.parametrize("content", [b"", b"hello world\n" * 50, "half", "onnx"])
def test_a_bad_file_is_one_sentence(runner: Any, bundle: Bundle, tmp_path: Path, content: bytes | str) -> None:
    name, words = READERS[runner]
    whole = bundle.file(name).read_bytes()
    other = {"half": whole[: len(whole) // 2], "onnx": bundle.file(MODEL_ONNX).read_bytes()}
    (file := tmp_path / name).write_bytes(other[content] if isinstance(content, str) else content)
    with pytest.raises(BundleError, match=words) as caught:
        runner(file, bundle.manifest.signature)
    assert "\n" not in caught.value.message


IMAGE = TensorSpec("input", "float32", ("batch", 1, 28, 28))


@pytest.mark.parametrize("runner", READERS)
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (TWO, "takes 1 inputs, but the manifest states 2"),
        (Signature((replace(IMAGE, shape=("batch", 3, 28, 28)),), TWO.outputs[:1]), "can't run its file"),
        (Signature((IMAGE,), (TensorSpec("y", "float32", ("batch", 7)),)), "has shape 2x10, expected 2x7"),
    ],
)
def test_a_file_with_another_signature_is_refused(runner: Any, bundle: Bundle, other: Signature, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        runner(bundle.file(READERS[runner][0]), other)


def test_a_device_that_is_not_here_is_an_error(bundle: Bundle) -> None:
    if torch_outputs.problem("cuda") is None:
        pytest.skip("this machine has the device")
    for open_it in (
        lambda: TorchScriptRunner(bundle.file(MODEL_TORCHSCRIPT), bundle.manifest.signature, device="cuda"),
        lambda: TorchEagerRunner(network(), bundle.manifest.signature, device="cuda"),
    ):
        with pytest.raises(RuntimeUnavailable, match="-cuda can't run here: "):
            open_it()
