"""The unfolded network in torch, eager mode: what the exported files must agree with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bnexport.bundle import WEIGHTS, Bundle
from bnexport.errors import BundleError, RuntimeUnavailable
from bnexport.optional import one_line, require
from bnexport.runtimes import torch_outputs
from bnexport.runtimes.base import REBUILD, Runner
from bnexport.tensors import Array, Signature

if TYPE_CHECKING:
    from torch import nn


class TorchEagerRunner(Runner):
    """Runs a copy of a module in eval mode; the module given is never changed.

    Args:
        module: The original, unfolded network.
        signature: Its inputs and outputs in the order of its arguments and results.
        device: "cpu" or "cuda".

    Raises:
        RuntimeUnavailable: The device is not here.
        BundleError: The module's outputs do not fit the signature.
    """

    def __init__(self, module: nn.Module, signature: Signature, *, device: str = "cpu") -> None:
        self.name = f"torch-{device}"
        self.signature = signature
        self._device = torch_outputs.need(self.name, device)
        self.effective_device = str(self._device)
        self._module = copy.deepcopy(module).to(self._device).eval()
        self.description = torch_outputs.describe("torch eager", self._device)
        self.probe()

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs, where = torch_outputs.call(self._module, self.signature, feeds, self._device)
        self.effective_device = str(where)
        return outputs

    def close(self) -> None:
        """Free the copy of the module."""
        super().close()
        del self._module


def open_bundle(bundle: Bundle, *, device: str = "cpu", module: nn.Module | None = None) -> TorchEagerRunner:
    """The runner of a bundle's original network.

    Args:
        bundle: Its manifest says where the network comes from.
        device: "cpu" or "cuda".
        module: The live network, for a bundle whose network only its author has.

    Raises:
        RuntimeUnavailable: The device is not here, or the network is not known and ``module`` not given.
        BundleError: The weights do not fit the network.
    """
    original = module if module is not None else original_network(bundle)
    if original is None:
        raise RuntimeUnavailable(
            f"torch-{device} needs the original network, which comes from {bundle.manifest.network.get('source')}",
            remedy="Pass the module, or --source file.py:factory",
        )
    return TorchEagerRunner(original, bundle.manifest.signature, device=device)


def original_network(bundle: Bundle) -> nn.Module | None:
    """The unfolded network rebuilt from the bundle's weights, in eval mode; None when its code is not bnexport's own.

    Raises:
        BundleError: The weights are damaged or are another network's.
    """
    if bundle.manifest.network.get("source") != "bn_lenet":
        return None
    safetensors = require("safetensors.torch", purpose="reading a bundle's weights")
    from bnexport.nn.lenet import bn_lenet

    file = bundle.file(WEIGHTS)
    try:
        network: nn.Module = bn_lenet(**bundle.manifest.network.get("options", {}))
        network.load_state_dict(safetensors.load_file(file))
    except Exception as error:  # safetensors' own class, torch's RuntimeError, TypeError for odd options
        raise BundleError(f"{file} does not hold the weights of bn_lenet: {one_line(error)}", remedy=REBUILD) from error
    return network.eval()
