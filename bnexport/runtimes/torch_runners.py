"""The runners of torch: the unfolded network in eager mode, TorchScript's interpreter, exported programs of torch.export."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.bundle import WEIGHTS, Bundle, Manifest
from bnexport.data.preprocessing import original_feeds
from bnexport.errors import REBUILD, BundleError, RuntimeUnavailable
from bnexport.optional import no_warnings, one_line, quiet, require
from bnexport.runtimes import torch_outputs
from bnexport.runtimes.base import RunSettings, device_remedy
from bnexport.tensors import Array, Signature
from bnexport.validation import validate_archive

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram


class TorchEagerRunner(torch_outputs.TorchRunner):
    """Runs a copy of the original, unfolded module in eval mode; the module given is never changed.

    ``manifest`` is that of the bundle: where its files take pixels, the module gets what the preprocessing makes of them.
    """

    def __init__(
        self,
        module: nn.Module,
        signature: Signature,
        *,
        device: str = "cpu",
        settings: RunSettings | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.start("torch", signature, device, settings)
        self._module = torch_outputs.private_copy(module, self._device)
        self._manifest = manifest
        self.probe()

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._manifest is not None and self._manifest.takes_pixels:
            exact = original_feeds(self._manifest, feeds)
            feeds = {name: array.astype(np.float32) for name, array in exact.items()}
        return super()._run(feeds)


def open_bundle(
    bundle: Bundle, device: str = "cpu", module: nn.Module | None = None, settings: RunSettings | None = None
) -> TorchEagerRunner:
    """Open a bundle's original network; ``module`` is the live one, for a bundle without its network's code."""
    torch_outputs.need(f"torch-{device}", device)
    if module is None:
        from bnexport.loading.sources import unknown_reason

        if (reason := unknown_reason(bundle.manifest.network)) is not None:
            raise RuntimeUnavailable(
                f"torch-{device} needs the original network, {reason}",
                remedy="Choose onnxruntime-cpu; bnexport verify --source FILE.py:FACTORY runs the network itself",
            )
        module = original_network(bundle)
    manifest = bundle.manifest
    return TorchEagerRunner(module, manifest.signature, device=device, settings=settings, manifest=manifest)


def original_network(bundle: Bundle) -> nn.Module:
    """Rebuild the unfolded network in eval mode, from the manifest and the bundle's weights."""
    from bnexport.loading.sources import build_known
    from bnexport.loading.weights import load_weights
    from bnexport.nn.calling import to_eval_mode

    network = build_known(bundle.manifest.network)
    load_weights(network, bundle.file(WEIGHTS))
    return to_eval_mode(network)


class TorchScriptRunner(torch_outputs.TorchRunner):
    """Runs a TorchScript file, model.pt, in torch's interpreter."""

    def __init__(
        self, file: Path, signature: Signature, *, device: str = "cpu", settings: RunSettings | None = None
    ) -> None:
        self.start("torchscript", signature, device, settings)
        self.description["file"] = file.name
        self._module = load_torchscript(file, self._device)
        self.refuse_other_arguments(file, len(list(self._module.graph.inputs())) - 1)  # the first is the module itself
        self.probe()


def load_torchscript(file: Path, device: str | torch.device = "cpu") -> Any:
    """Load a TorchScript file in eval mode; a BundleError refuses another or a damaged file."""
    validate_archive(file, "torchscript")
    torch = require("torch", purpose="the TorchScript runner")
    try:
        with no_warnings:  # deprecated upstream; TorchScript is a required format of this project
            # Not .to(device) afterwards: it would leave constants of the graph where they are.
            module = torch.jit.load(str(file), map_location=device)
            module.eval()
            return module
    except Exception as error:  # RuntimeError, ValueError, UnpicklingError: depends on where the bytes are wrong
        if torch_outputs.device_fault(error):
            raise RuntimeUnavailable(
                f"{file} can't be loaded on {device}: {one_line(error, 160)}", remedy=device_remedy(str(error))
            ) from error
        raise BundleError(f"{file} is not a TorchScript file: {one_line(error, 160)}", remedy=REBUILD) from error


def tensor_constants(graph: Any) -> list[Any]:
    """Return the nodes of a TorchScript graph and its inner blocks that hold a tensor: freezing makes weights constants."""
    return [
        node
        for node in graph.findAllNodes("prim::Constant", True)
        if node.hasAttribute("value") and node.kindOf("value") == "t"
    ]


class ExportedProgramRunner(torch_outputs.TorchRunner):
    """Runs model.pt2, an exported program of torch.export."""

    def __init__(
        self, file: Path, signature: Signature, *, device: str = "cpu", settings: RunSettings | None = None
    ) -> None:
        self.start("torch-export", signature, device, settings)
        self.description["file"] = file.name
        program = load_exported_program(file)
        self.refuse_other_arguments(file, len(program.graph_signature.user_inputs))
        try:
            self._module = _on_device(program, self._device).module()
        except Exception as error:  # a full GPU, or a graph that can't be moved
            raise self._translated(error) from error
        self.probe()


def load_exported_program(file: Path) -> ExportedProgram:
    """Load a file of torch.export on the CPU; a BundleError refuses another or a damaged file."""
    validate_archive(file, "pt2")
    torch: Any = require("torch", purpose="the torch.export runner")
    try:
        with quiet():  # torch 2.11 warns about its buffers
            program: ExportedProgram = torch.export.load(str(file))
    except Exception as error:  # torch.export raises many unrelated classes
        raise BundleError(f"{file} is not a file of torch.export: {one_line(error, 160)}", remedy=REBUILD) from error
    return program


def _on_device(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    """Return the program with its weights, and the tensors that it makes, on a device."""
    if device.type == "cpu":
        return program
    from torch.export.passes import move_to_device_pass

    with contextlib.suppress(AttributeError):  # the example inputs are not needed, and have to be moved otherwise
        program._example_inputs = None
    return move_to_device_pass(program, device)
