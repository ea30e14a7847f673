"""TorchScript: scripted and frozen from the folded graph."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch.fx import GraphModule

from bnexport.errors import ExportError
from bnexport.exporting.varying import flat
from bnexport.files import write_atomically
from bnexport.optional import one_line


def export_torchscript(folded: GraphModule, path: Path) -> None:
    """Write ``model.pt``, which ``torch.jit.load`` reads without bnexport.

    The folded graph is a straight line of ATen calls, which TorchScript compiles as it is; tracing it would freeze every
    size that is computed from the batch. Freezing only turns parameters into constants: its numerical optimisations are
    switched off, so that the weights in the file are the folded ones bit for bit. Outputs nested in a dict or a tuple are
    given flat, in the order of the bundle's signature.

    Args:
        folded: The folded network, in eval mode.
        path: The file.

    Raises:
        ExportError: TorchScript can't compile the graph.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated upstream and says so at each call
        try:
            scripted = torch.jit.script(_scriptable(folded))
            frozen = torch.jit.freeze(scripted.eval(), optimize_numerics=False)
            buffer = io.BytesIO()
            torch.jit.save(frozen, buffer)
        except Exception as error:  # torch.jit raises bare RuntimeErrors, OSErrors and its own frontend errors
            raise ExportError(
                f"TorchScript can't compile the folded graph: {one_line(error)}",
                remedy="Export ONNX alone with --format onnx; that file does not depend on TorchScript",
            ) from error
    write_atomically(path, buffer.getvalue())


def _scriptable(folded: GraphModule) -> GraphModule:
    """A copy of the graph in TorchScript's vocabulary: operators by name without overload, sizes by ``Tensor.size``."""
    module = flat(folded)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
    module.recompile()
    return module
