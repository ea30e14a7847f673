"""The unfolded network in torch, eager mode: what the exported files must agree with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnexport.bundle import WEIGHTS, Bundle
from bnexport.errors import RuntimeUnavailable
from bnexport.runtimes import torch_outputs
from bnexport.runtimes.settings import RunSettings
from bnexport.tensors import Signature

if TYPE_CHECKING:
    from torch import nn


class TorchEagerRunner(torch_outputs.TorchRunner):
    """Runs a copy of a module in eval mode; the module given is never changed.

    Args:
        module: The original, unfolded network.
        signature: Its inputs and outputs in the order of its arguments and results.
        device: "cpu" or "cuda".
        settings: Precision, search and threads; default: strict float32.

    Raises:
        RuntimeUnavailable: The device is not here, or full.
        ModelError: The module can't be copied.
        BundleError: The module's outputs do not fit the signature.
    """

    def __init__(
        self, module: nn.Module, signature: Signature, *, device: str = "cpu", settings: RunSettings | None = None
    ) -> None:
        self.start("torch", signature, device, settings)
        self._module = torch_outputs.private_copy(module, self._device)
        self.probe()


def open_bundle(
    bundle: Bundle, *, device: str = "cpu", module: nn.Module | None = None, settings: RunSettings | None = None
) -> TorchEagerRunner:
    """The runner of a bundle's original network.

    Args:
        bundle: Its manifest says where the network comes from.
        device: "cpu" or "cuda".
        module: The live network, for a bundle whose network only its author has.
        settings: As for ``TorchEagerRunner``.

    Raises:
        RuntimeUnavailable: The device is not here, or ``module`` is missing for a network that can't be rebuilt here.
        BundleError: The bundle holds no weights.
        ModelError: The weights do not fit the network.
    """
    torch_outputs.need(f"torch-{device}", device)
    if module is None:
        from bnexport.loading.sources import unknown_reason

        if (reason := unknown_reason(bundle.manifest.network)) is not None:
            raise RuntimeUnavailable(
                f"torch-{device} needs the original network, {reason}",
                remedy="Pass the module, or --source file.py:factory",
            )
        module = original_network(bundle)
    return TorchEagerRunner(module, bundle.manifest.signature, device=device, settings=settings)


def original_network(bundle: Bundle) -> nn.Module:
    """The unfolded network, rebuilt from what the manifest says and the bundle's weights, in eval mode.

    Raises:
        BundleError: The bundle holds no weights.
        ModelError: Not a network that bnexport knows, or the weights are damaged or another network's.
        MissingDependency: The package that defines the network is not installed.
    """
    from bnexport.loading.sources import build_known
    from bnexport.loading.weights import load_weights

    network = build_known(bundle.manifest.network)
    load_weights(network, bundle.file(WEIGHTS))
    return network.eval()
