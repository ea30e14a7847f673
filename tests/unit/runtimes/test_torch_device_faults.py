"""Faults of a GPU, and of networks that only work on a CPU, with torch's own classes and messages; no GPU is needed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.bundles import network
from torch import nn

from bnexport.bundle import MODEL_TORCHSCRIPT, Bundle
from bnexport.errors import BundleError, ModelError, RuntimeUnavailable
from bnexport.runtimes import torch_outputs
from bnexport.runtimes.torch_runners import TorchEagerRunner, TorchScriptRunner
from bnexport.tensors import Signature, TensorSpec

X = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)
ASYNC = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."
    "\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
FULL = (
    "CUDA out of memory. Tried to allocate 2.37 GiB. GPU 0 has a total capacity of 10.76 GiB of which 1.35 GiB is free. "
    "Including non-PyTorch memory, this process has 9.40 GiB memory in use."
)
RUNTIME, ACCELERATOR = RuntimeError, torch.AcceleratorError
NEW_PROCESS, FREE = "Try again in a new process", "Free the GPU's memory"
START = "Free some of the GPU's memory, which cuBLAS and cuDNN need to start"
#: torch's class, its message -> the remedy's first words.
FAULTS: dict[str, tuple[type[Exception], str, str]] = {
    "full": (torch.OutOfMemoryError, FULL, FREE),
    "full, from CUDA itself": (ACCELERATOR, "CUDA error: out of memory" + ASYNC, FREE),
    "no memory for cuBLAS": (RUNTIME, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", FREE),
    "no kernels": (
        ACCELERATOR, "CUDA error: no kernel image is available for execution on the device" + ASYNC,
        "Install a build of the engine that has kernels for this GPU",
    ),
    "old driver": (
        RUNTIME, "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
        "Update the NVIDIA driver",
    ),
    "illegal access": (ACCELERATOR, "CUDA error: an illegal memory access was encountered" + ASYNC, NEW_PROCESS),
    "assert": (ACCELERATOR, "CUDA error: device-side assert triggered" + ASYNC, NEW_PROCESS),
    "cuDNN": (RUNTIME, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", NEW_PROCESS),
    "cuBLAS did not start": (
        RUNTIME, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", START,
    ),
    "cuDNN did not start": (RUNTIME, "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", START),
}  # fmt: skip


def raising(kind: type[Exception], text: str) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        # AcceleratorError can't be made from Python with a message alone in every version.
        error = kind.__new__(kind)
        error.args = (text,)
        raise error

    return fail


class AsCuda:
    """A stand-in for torch.device("cuda:0") on which this process can compute."""

    type = "cuda"

    def __str__(self) -> str:
        return "cuda:0"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_outputs, "need", lambda name, device: AsCuda())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "a GPU")
    monkeypatch.setattr(torch_outputs, "private_copy", lambda module, device: module)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("gpu")
def test_a_full_gpu_while_loading_torchscript_is_not_a_bad_file(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    kind, text, remedy = FAULTS[fault]
    monkeypatch.setattr(torch.jit, "load", raising(kind, text))
    with pytest.raises(RuntimeUnavailable, match="can't be loaded on cuda:0") as caught:
        TorchScriptRunner(bundle.file(MODEL_TORCHSCRIPT), bundle.manifest.signature, device="cuda")
    assert "is not a TorchScript file" not in caught.value.message
    assert caught.value.remedy.startswith(remedy)
    assert remedy.startswith("Free") or "memory" not in caught.value.remedy


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("gpu")
def test_each_fault_of_a_run_has_its_own_remedy(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fault: str, interpreted: bool
) -> None:
    kind, text, remedy = FAULTS[fault]
    if interpreted:  # TorchScript's interpreter puts a traceback in front
        trace = '  File "code/__torch__/network.py", line 36, in forward\n    x0 = torch.conv2d(x)\n' * 5
        kind = RuntimeError
        first = "The following operation failed in the TorchScript interpreter."
        text = f"{first}\nTraceback of TorchScript (most recent call last):\n{trace}RuntimeError: {text}\n"
    monkeypatch.setattr(torch_outputs, "call", raising(kind, text))
    with pytest.raises(RuntimeUnavailable) as caught:
        TorchEagerRunner(network(), bundle.manifest.signature, device="cuda")
    message = FAULTS[fault][1].split("\n")[0][:60]
    assert caught.value.message.startswith(f"torch-cuda failed on cuda:0: {message}")
    assert caught.value.remedy.startswith(remedy)


@pytest.mark.usefixtures("gpu")
def test_a_fault_of_the_file_is_not_a_missing_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is a verdict, and not "not run here"."""
    text = "mat1 and mat2 shapes cannot be multiplied (2x98 and 72x3)"
    monkeypatch.setattr(torch_outputs, "call", raising(RuntimeError, text))
    with pytest.raises(BundleError, match="can't run its file: mat1 and mat2 shapes"):
        TorchEagerRunner(network(), bundle.manifest.signature, device="cuda")


@pytest.mark.parametrize(
    "text",
    [
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        "Expected all tensors to be on the same device, but got mat1 is on cpu, different from other tensors on cuda:0 "
        "(when checking argument in method wrapper_CUDA_addmm)",
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
        "indices should be either on cpu or on the same device as the indexed tensor (cuda)",
    ],
)
@pytest.mark.usefixtures("gpu")
def test_a_tensor_on_another_device_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(torch_outputs, "call", raising(RuntimeError, text))
    with pytest.raises(BundleError, match="a tensor on another device than its input") as caught:
        TorchEagerRunner(network(), bundle.manifest.signature, device="cuda")
    assert "device=x.device" in caught.value.remedy


class Fixed(nn.Module):
    """Keeps a tensor that is not a buffer, so that ``.to`` does not move it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.ones(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10] + self.shift


def test_torchs_own_error_of_two_devices_is_recognised(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_outputs, "need", lambda name, device: torch.device("meta"))
    with pytest.raises(BundleError, match="a tensor on another device than its input"):
        TorchEagerRunner(Fixed(), bundle.manifest.signature)


def test_torchscripts_own_traceback_does_not_hide_the_error(bundle: Bundle) -> None:
    wide = Signature((TensorSpec("input", "float32", ("batch", 3, 28, 28)),), bundle.manifest.signature.outputs)
    with pytest.raises(BundleError, match=r"can't run its file: .*expected input.* to have 1 channels") as caught:
        TorchScriptRunner(bundle.file(MODEL_TORCHSCRIPT), wide)
    assert "Traceback" not in caught.value.message


@pytest.mark.parametrize("fault", FAULTS)
def test_a_module_that_a_gpu_does_not_take(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, text, remedy = FAULTS[fault]
    monkeypatch.setattr(nn.Module, "to", raising(kind, text))
    with pytest.raises(RuntimeUnavailable, match="the module can't be moved to cuda:0") as caught:
        torch_outputs.private_copy(nn.Linear(2, 2), "cuda:0")
    assert caught.value.remedy.startswith(remedy)


def test_a_module_that_cannot_be_copied_is_not_a_fault_of_a_gpu() -> None:
    class Stuck(nn.Module):
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("no copies")

    with pytest.raises(ModelError, match="no copies"):
        torch_outputs.private_copy(Stuck(), "cuda:0")


def test_a_gpu_that_can_not_be_opened_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_outputs, "problem", lambda device: None)
    text = "CUDA error: CUDA-capable device(s) is/are busy or unavailable" + ASYNC
    monkeypatch.setattr(torch.cuda, "current_device", raising(RuntimeError, text))
    with pytest.raises(RuntimeUnavailable, match="torch-cuda can't run here: CUDA error: CUDA-capable") as caught:
        torch_outputs.need("torch-cuda", "cuda")
    assert "\n" not in caught.value.message


def test_the_driver_s_message_is_the_reason_for_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``is_available`` only warns, and torch 2.14 does not even warn."""
    old = "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError, old))
    assert torch_outputs.problem("cuda") == old


@pytest.mark.parametrize("place", ["cudnn.conv", "cuda.matmul"])
@pytest.mark.usefixtures("gpu")
def test_a_strict_run_that_reads_back_tf32_refuses(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def spoilt(*_: object) -> tuple[dict[str, np.ndarray], object]:
        holder: Any = torch.backends
        for name in place.split("."):
            holder = getattr(holder, name)
        holder.fp32_precision = "tf32"
        return {"logits": np.zeros((2, 10), np.float32)}, AsCuda()

    before = torch.backends.cudnn.conv.fp32_precision
    monkeypatch.setattr(torch_outputs, "call", spoilt)
    with pytest.raises(RuntimeUnavailable, match=f"strict float32 was requested, but .* {place} TF32") as caught:
        TorchEagerRunner(network(), bundle.manifest.signature, device="cuda")
    assert "Remove the code that changes torch's precision" in caught.value.remedy
    assert torch.backends.cudnn.conv.fp32_precision == before
