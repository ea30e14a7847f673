"""model.pt2, an exported program of torch.export, run by torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.errors import BundleError
from bnexport.optional import one_line, quiet, require
from bnexport.runtimes import torch_outputs
from bnexport.runtimes.base import REBUILD
from bnexport.runtimes.settings import RunSettings
from bnexport.tensors import Signature
from bnexport.validation import validate_archive

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


class ExportedProgramRunner(torch_outputs.TorchRunner):
    """Runs a .pt2 file.

    Args:
        file: model.pt2.
        signature: What the file must take and give, in the order of its arguments and results.
        device: "cpu" or "cuda".
        settings: Precision, search and threads; default: strict float32.

    Raises:
        RuntimeUnavailable: The device is not here, or full.
        BundleError: Not a file of torch.export, or one with another signature.
    """

    def __init__(
        self, file: Path, signature: Signature, *, device: str = "cpu", settings: RunSettings | None = None
    ) -> None:
        self.start("torch-export", signature, device, settings)
        self.description["file"] = file.name
        program = load(file)
        taken = len(program.graph_signature.user_inputs)
        if taken != len(signature.inputs):
            raise BundleError(f"{file} takes {taken} inputs, the manifest says {len(signature.inputs)}", remedy=REBUILD)
        try:
            self._module = _on_device(program, self._device).module()
        except Exception as error:  # a full GPU, or a graph that can't be moved
            raise self._translated(error) from error
        self.probe()


def load(file: Path) -> ExportedProgram:
    """Load a file of torch.export on the CPU.

    Raises:
        BundleError: Not such a file, a damaged one, or one that the screening refuses.
    """
    validate_archive(file, "pt2")
    torch: Any = require("torch", purpose="the torch.export runner")
    try:
        with quiet():  # torch 2.11 warns of its own buffers
            program: ExportedProgram = torch.export.load(str(file))
    except Exception as error:  # torch.export raises many unrelated classes
        raise BundleError(f"{file} is not a file of torch.export: {one_line(error, 160)}", remedy=REBUILD) from error
    return program


def _on_device(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    """The program with its weights, and what it makes on its way, on a device."""
    if device.type == "cpu":
        return program
    from torch.export.passes import move_to_device_pass

    with contextlib.suppress(AttributeError):  # the example inputs are not needed, and have to be moved otherwise
        program._example_inputs = None
    return move_to_device_pass(program, device)
