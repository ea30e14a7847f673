"""The common part of the torch runners: calling a module, devices, precision, feeds to tensors, outputs to arrays."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.errors import REBUILD, BnexportError, BundleError, ModelError, RuntimeUnavailable
from bnexport.optional import installed, no_warnings, one_line
from bnexport.reproducibility import STRICT, effective_precision, float32_precision, override_problem
from bnexport.runtimes.base import Runner, RunSettings, device_remedy
from bnexport.tensors import Array, Signature

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Name of a runner without its device -> what its description calls the engine.
ENGINES = {"torch": "torch eager", "torchscript": "torchscript", "torch-export": "torch.export"}
#: Words of torch for tensors that are on different devices.
_TWO_DEVICES = ("the same device", "the expected device", "object of device type")
#: TorchScript's interpreter puts its whole traceback before the error itself.
_INTERPRETER = "The following operation failed in the TorchScript interpreter"
_RAISED = re.compile(r"^(?:[\w.]+(?:Error|Exception): )+", re.MULTILINE)
_WEIGHT_ELSEWHERE = re.compile(
    r"type \(torch\.(?!cuda).* type \(torch\.cuda|type \(torch\.cuda.* type \(torch\.(?!cuda)"
)
#: Words of torch for faults of CUDA and its libraries, many of which are plain RuntimeError.
_DEVICE_WORDS = (
    "CUDA", "cuDNN", "CUDNN_", "CUBLAS_", "cuBLAS", "cuFFT", "nvrtc", "NVIDIA driver", "unable to find an engine",
)  # fmt: skip
REMEDY = "Install an NVIDIA driver and a torch built for CUDA; in a container, pass the GPU through"


class TorchRunner(Runner):
    """A runner that calls a module: eager, TorchScript or exported program. A subclass sets ``_module`` and calls ``start``.

    The constructors of all three take the file or module, the signature in the order of arguments and results, the device
    ("cpu" or "cuda"), and settings (default: strict float32).
    """

    _module: Any
    _device: torch.device
    _settings: RunSettings

    def start(self, name: str, signature: Signature, device: str, settings: RunSettings | None) -> None:
        """Set the common attributes, before the file is opened; refuse a device or precision that is impossible here."""
        self.name = f"{name}-{device}"
        self.signature = signature
        self._settings = settings or RunSettings()
        self._device = need(self.name, device)
        if device == "cuda" and (reason := override_problem(self._settings.precision)) is not None:
            raise RuntimeUnavailable(
                f"{self.name} can't run here: {reason}", remedy="Unset that variable, or run in a separate process"
            )
        self.effective_device = str(self._device)
        import torch

        gpu = {"gpu": torch.cuda.get_device_name(self._device)} if device == "cuda" else {}
        version = str(torch.__version__)
        self.description = {"engine": ENGINES[name], "version": version, "device": self.effective_device, **gpu}

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        settings = self._settings
        exhaustive = settings.conv_search == "exhaustive"
        with float32_precision(settings.precision, exhaustive=exhaustive, threads=settings.threads):
            outputs, where = call(self._module, self.signature, feeds, self._device)
            # After the call, so that a forward, or another thread, that changed the precision is noticed.
            found = effective_precision(where.type)
        self.description["precision"] = found
        self.effective_device = self.description["device"] = str(where)
        # On a CPU these settings take effect only if it has narrower kernels, so there the error itself is judged.
        if where.type == "cuda" and settings.precision == "float32" and found != STRICT:
            raise RuntimeUnavailable(
                f"{self.name}: {STRICT} was requested, but after the run torch is set to {found}",
                remedy="Remove the code that changes torch's precision, in the network or in another thread, or run isolated",
            )
        return outputs

    def _translated(self, error: Exception) -> BnexportError:
        """Keep faults of the GPU apart from those of the file or network, which no other GPU would run either."""
        text = str(error)
        if text.startswith(_INTERPRETER):
            text = _RAISED.split(text)[-1]
        short = one_line(RuntimeError(text))
        if any(words in text for words in _TWO_DEVICES) or _WEIGHT_ELSEWHERE.search(text):
            return BundleError(
                f"{self.name}: the network keeps or makes a tensor on another device than its input: {short}",
                remedy="Register the tensor as a buffer, or make it with device=x.device; then write the bundle again",
            )
        if not device_fault(error):
            return BundleError(f"{self.name} can't run its file: {short}", remedy=REBUILD)
        return super()._translated(RuntimeError(text))

    def refuse_other_arguments(self, file: Path, taken: int) -> None:
        """Refuse a file whose function does not take as many inputs as the signature has."""
        if taken != (expected := len(self.signature.inputs)):
            raise BundleError(f"{file} takes {taken} inputs, but the manifest states {expected}", remedy=REBUILD)

    def close(self) -> None:
        """Free the module."""
        super().close()
        self._module = None


def problem(device: str) -> str | None:
    """Return why torch can't run on a device ("cpu" or "cuda") here, as one line; None when it can."""
    if not installed("torch"):
        return "torch is not installed"
    if device == "cpu":
        return None
    import torch

    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"this torch ({torch.__version__}) is built without CUDA"
    with no_warnings:  # an old driver is only a warning here, and an error below
        available = torch.cuda.is_available()
    if available:
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # RuntimeError, or torch.AcceleratorError, with the driver's own words
        return one_line(error)
    return "torch finds no CUDA device"


def need(name: str, device: str) -> torch.device:
    """Return the torch device of a runner; RuntimeUnavailable where it is missing or can't be opened."""
    if (reason := problem(device)) is not None:
        raise RuntimeUnavailable(f"{name} can't run here: {reason}", remedy=REMEDY)
    import torch

    if device == "cpu":
        return torch.device("cpu")
    try:
        return torch.device("cuda", torch.cuda.current_device())
    except Exception as error:  # the first call of CUDA: a GPU that is full, or reserved by another process
        raise RuntimeUnavailable(
            f"{name} can't run here: {one_line(error)}", remedy=device_remedy(str(error))
        ) from error


def private_copy(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a user's module in eval mode on a device; the module itself is never changed."""
    from bnexport.nn.calling import to_eval_mode

    try:
        # A module may be on a GPU that is nearly full: the copy is made there.
        return to_eval_mode(copy.deepcopy(module)).to(device, dtype)
    except Exception as error:  # the module is the user's code
        if device_fault(error):
            raise RuntimeUnavailable(
                f"the module can't be moved to {device}: {one_line(error)}", remedy=device_remedy(str(error))
            ) from error
        raise ModelError(
            f"the module can't be copied: {one_line(error)}", remedy="Make copy.deepcopy(module) work"
        ) from error


def device_fault(error: Exception) -> bool:
    """Return True if an exception of torch is a fault of the GPU or its libraries, and not of a file or network."""
    import torch

    kinds = (torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, kinds) or any(words in str(error) for words in _DEVICE_WORDS)


def call(
    function: Callable[..., Any], signature: Signature, feeds: Mapping[str, Array], device: torch.device
) -> tuple[dict[str, Array], torch.device]:
    """Call a module with arrays in the signature's order; the caller sets the precision of float32 kernels.

    Return outputs by name (fewer than the signature's when the module gives fewer), and their device.
    """
    import torch

    # from_numpy refuses read-only arrays with a warning; the copy also keeps the caller's arrays from in-place modules.
    tensors = [torch.from_numpy(np.array(feeds[spec.name], copy=True)).to(device) for spec in signature.inputs]
    with torch.inference_mode():
        results = flatten(function(*tensors))
    names = [spec.name for spec in signature.outputs]
    where = results[0].device if results else device
    return {name: tensor.cpu().numpy() for name, tensor in zip(names, results, strict=False)}, where


def flatten(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a module's result in order: a tensor, or tuples, lists, dicts and dataclasses of them.

    None and other values are left out.
    """
    import torch

    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        result = list(result.values())
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = [getattr(result, item.name) for item in dataclasses.fields(result) if item.init]
    if isinstance(result, list | tuple):
        return [tensor for item in result for tensor in flatten(item)]
    return []
