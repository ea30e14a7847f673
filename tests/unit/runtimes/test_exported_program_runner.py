from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.bundles import network
from torch import nn

from bnexport.bundle import MODEL_EXPORTED, Bundle
from bnexport.errors import BundleError, RuntimeUnavailable
from bnexport.runtimes import torch_outputs
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.reference_runner import ReferenceRunner
from bnexport.runtimes.torch_runners import ExportedProgramRunner, TorchEagerRunner
from bnexport.verification.reference import Reference

X = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)


def test_the_description_states_what_runs(bundle: Bundle) -> None:
    with ExportedProgramRunner(bundle.file(MODEL_EXPORTED), bundle.manifest.signature) as runner:
        assert runner.name == "torch-export-cpu"
        assert runner.description == {
            "engine": "torch.export", "version": torch.__version__, "device": "cpu", "file": "model.pt2",
            "precision": "strict float32",
        }  # fmt: skip


class Look(nn.Module):
    """Keeps the settings in effect while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[object, ...]] = []

    def __deepcopy__(self, memo: object) -> Look:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        backends = torch.backends
        precision = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
        self.seen.append((*precision, backends.cudnn.benchmark, torch.get_num_threads()))
        return x.flatten(1)[:, :10]


@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("search", ["heuristic", "exhaustive"])
def test_settings_hold_in_the_call_and_not_after_it(bundle: Bundle, precision: str, search: str) -> None:
    def in_effect() -> tuple[object, ...]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.benchmark, torch.get_num_threads()

    before, threads = in_effect(), torch.get_num_threads() + 1
    settings = RunSettings(precision, conv_search=search, threads=threads)
    with TorchEagerRunner(look := Look(), bundle.manifest.signature, settings=settings) as runner:
        runner.run({"input": X})
    value = {"float32": "ieee", "tf32": "tf32"}[precision]
    assert set(look.seen) == {(value, value, search == "exhaustive", threads)}
    assert before == in_effect()


def test_a_forward_that_sets_its_own_precision_is_reported(bundle: Bundle) -> None:
    class Fast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            return x.flatten(1)[:, :10]

    before = torch.backends.mkldnn.matmul.fp32_precision
    with TorchEagerRunner(Fast(), bundle.manifest.signature) as runner:
        assert runner.description["precision"].startswith("mkldnn.matmul bf16, ")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("name", ["torch-cuda", "torchscript-cuda", "torch-export-cuda"])
def test_a_variable_that_goes_before_settings_is_refused(
    bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TF32 run under NVIDIA_TF32_OVERRIDE=0 would be a strict run under the name of TF32."""
    monkeypatch.setattr(torch_outputs, "need", lambda name, device: torch.device("cpu"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(RuntimeUnavailable, match="NVIDIA_TF32_OVERRIDE=0 is set"):
        runner_spec(name).open(bundle, settings=RunSettings("tf32"))


def test_the_reference_is_float64_rounded_once(bundle: Bundle) -> None:
    with ReferenceRunner(bundle) as runner:
        logits = runner.run({"input": X})["logits"]
        assert runner.description["precision"] == "float64, outputs rounded once"
        assert runner.description["engine"] == "onnx.reference"
    exact = Reference(network(), bundle.manifest.signature, description="").evaluate({"input": X})["logits"]
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    with runner_spec("onnxruntime-cpu").open(bundle) as runner:
        usual = np.abs(runner.run({"input": X})["logits"] - exact).max() / np.abs(exact).max()
    # Half a unit in the last place of the outputs, and the rounding of the weights; no engine's sums.
    assert error < 1.5e-7 < 1e-5
    assert error <= usual


def test_the_reference_refuses_another_signature(bundle: Bundle) -> None:
    signature = bundle.manifest.signature
    renamed = replace(signature, inputs=(replace(signature.inputs[0], name="image"),))
    with pytest.raises(BundleError, match=r"has the inputs \['input'\], but the manifest states \['image'\]"):
        ReferenceRunner(Bundle(bundle.path, replace(bundle.manifest, signature=renamed)))
    named = replace(signature, outputs=(replace(signature.outputs[0], name="scores"),))
    with pytest.raises(BundleError, match="returned no output 'scores'"):
        ReferenceRunner(Bundle(bundle.path, replace(bundle.manifest, signature=named)))
