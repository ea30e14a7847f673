"""model.pt in torch's TorchScript interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.errors import BundleError, RuntimeUnavailable
from bnexport.optional import no_warnings, one_line, require
from bnexport.runtimes import torch_outputs
from bnexport.runtimes.base import REBUILD, device_remedy
from bnexport.runtimes.settings import RunSettings
from bnexport.tensors import Signature
from bnexport.validation import validate_archive

if TYPE_CHECKING:
    import torch


class TorchScriptRunner(torch_outputs.TorchRunner):
    """Runs a TorchScript file.

    Args:
        file: model.pt.
        signature: What the file must take and give, in the order of its arguments and results.
        device: "cpu" or "cuda".
        settings: Precision, search and threads; default: strict float32.

    Raises:
        RuntimeUnavailable: The device is not here, is full, or failed.
        BundleError: The file is not a TorchScript file, or has another signature.
    """

    def __init__(
        self, file: Path, signature: Signature, *, device: str = "cpu", settings: RunSettings | None = None
    ) -> None:
        self.start("torchscript", signature, device, settings)
        self.description["file"] = file.name
        self._module = load(file, self._device)
        self._refuse_other_arguments(file)
        self.probe()

    def _refuse_other_arguments(self, file: Path) -> None:
        expected = len(self.signature.inputs)
        taken = len(list(self._module.graph.inputs())) - 1  # the first is the module itself
        if taken != expected:
            raise BundleError(f"{file} takes {taken} inputs, the manifest says {expected}", remedy=REBUILD)


def load(file: Path, device: str | torch.device = "cpu") -> Any:
    """Load a TorchScript file in eval mode.

    Raises:
        BundleError: The file is not a TorchScript file, is damaged, or is refused by the screening.
        RuntimeUnavailable: The device is full, or failed.
    """
    validate_archive(file, "torchscript")
    torch = require("torch", purpose="the TorchScript runner")
    try:
        with no_warnings:  # deprecated upstream; TorchScript is one of the formats asked of this project
            # Not .to(device) afterwards: it would leave constants of the graph where they are.
            return torch.jit.load(str(file), map_location=device).eval()
    except Exception as error:  # RuntimeError, ValueError, UnpicklingError: depends on where the bytes are wrong
        if torch_outputs.device_fault(error):
            raise RuntimeUnavailable(
                f"{device} does not take {file}: {one_line(error, 160)}", remedy=device_remedy(str(error))
            ) from error
        raise BundleError(f"{file} is not a TorchScript file: {one_line(error, 160)}", remedy=REBUILD) from error


def tensor_constants(graph: Any) -> list[Any]:
    """Nodes of a TorchScript graph, and of the blocks inside it, that hold a tensor: freezing makes weights of them."""
    return [
        node
        for node in graph.findAllNodes("prim::Constant", True)
        if node.hasAttribute("value") and node.kindOf("value") == "t"
    ]
