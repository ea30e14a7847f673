"""What all torch runners share: calling a module, devices, precision, feeds to tensors, outputs to arrays."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.errors import ModelError, RuntimeUnavailable
from bnexport.optional import installed, one_line
from bnexport.reproducibility import effective_precision, float32_precision, override_problem
from bnexport.runtimes.base import Runner
from bnexport.runtimes.settings import RunSettings
from bnexport.tensors import Array, Signature

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Name of a runner without its device -> what its description calls the engine.
ENGINES = {"torch": "torch eager", "torchscript": "torchscript", "torch-export": "torch.export"}
REMEDY = "Install an NVIDIA driver and a torch built for CUDA; in a container hand the GPU through"


class TorchRunner(Runner):
    """A runner that calls a module: eager, TorchScript or exported program. A subclass sets ``_module`` and calls ``start``."""

    _module: Any
    _device: torch.device
    _settings: RunSettings

    def start(self, name: str, signature: Signature, device: str, settings: RunSettings | None) -> None:
        """Set what every torch runner has, before the file is opened.

        Raises:
            RuntimeUnavailable: The device is not here, or the environment forbids the precision.
        """
        self.name = f"{name}-{device}"
        self.signature = signature
        self._settings = settings or RunSettings()
        self._device = need(self.name, device)
        if device == "cuda" and (reason := override_problem(self._settings.precision)) is not None:
            raise RuntimeUnavailable(
                f"{self.name} can't run here: {reason}", remedy="Unset it, or run in a process of its own"
            )
        self.effective_device = str(self._device)
        self.description = describe(name, self._device)

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        settings = self._settings
        exhaustive = settings.conv_search == "exhaustive"
        with float32_precision(settings.precision, exhaustive=exhaustive), _threads(settings.threads):
            outputs, where = call(self._module, self.signature, feeds, self._device)
            # After the call, so that a forward which sets a precision of its own is told on.
            self.description["precision"] = effective_precision(where.type)
        self.effective_device = self.description["device"] = str(where)
        return outputs

    def close(self) -> None:
        """Free the module."""
        super().close()
        self._module = None


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Threads inside one operator, in this block; None leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def problem(device: str) -> str | None:
    """Why torch can't run on a device ("cpu" or "cuda") here, one line; None when it can."""
    if not installed("torch"):
        return "torch is not installed"
    if device == "cpu":
        return None
    import torch

    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"this torch ({torch.__version__}) is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:  # an old driver is only a warning to torch, and the reason
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return None
    return (
        one_line(caught[0].message)
        if caught and isinstance(caught[0].message, Warning)
        else "torch sees no CUDA device"
    )


def need(name: str, device: str) -> torch.device:
    """The torch device of a runner.

    Raises:
        RuntimeUnavailable: It is not here.
    """
    if (reason := problem(device)) is not None:
        raise RuntimeUnavailable(f"{name} can't run here: {reason}", remedy=REMEDY)
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def private_copy(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a user's module in eval mode on a device; the module itself is never changed.

    Raises:
        ModelError: It can't be copied.
        RuntimeUnavailable: The GPU's memory does not take it.
    """
    try:
        return copy.deepcopy(module).eval().to(device, dtype)
    except Exception as error:  # the module is the user's code
        if str(device).startswith("cuda"):
            raise RuntimeUnavailable(f"{device} does not take the module: {one_line(error)}", remedy=REMEDY) from error
        raise ModelError(
            f"the module can't be copied: {one_line(error)}", remedy="Make copy.deepcopy(module) work"
        ) from error


def call(
    function: Callable[..., Any], signature: Signature, feeds: Mapping[str, Array], device: torch.device
) -> tuple[dict[str, Array], torch.device]:
    """Call a module with arrays in the signature's order; the precision of float32 kernels is the caller's to set.

    Returns:
        Outputs by name (fewer than the signature's when the module gives fewer), and the device they came from.
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
    """The tensors of a module's result in order: a tensor, or tuples, lists, dicts and dataclasses of them.

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


def describe(engine: str, where: torch.device) -> dict[str, Any]:
    """Engine, version and device as plain JSON values; each run adds the precision that was in effect."""
    import torch

    gpu = {"gpu": torch.cuda.get_device_name(where)} if where.type == "cuda" else {}
    return {"engine": ENGINES[engine], "version": str(torch.__version__), "device": str(where), **gpu}
