"""torch.export's own file (.pt2), the successor of TorchScript, written from the folded graph."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from bnexport.errors import ExportError
from bnexport.exporting.varying import export_flat
from bnexport.files import write_atomically
from bnexport.optional import one_line, quiet
from bnexport.tensors import Signature


def export_program(folded: GraphModule, inputs: tuple[Tensor, ...], path: Path, *, signature: Signature) -> None:
    """Write ``model.pt2``, which ``torch.export.load(path).module()`` reads without bnexport; the same bytes each time.

    Outputs nested in a dict or a tuple are given flat, in the order of the signature, as ``model.pt`` gives them. What
    varies there varies here: the batch, and sizes that have names.

    Args:
        folded: The folded network, in eval mode.
        inputs: Example inputs with a batch of at least 2; they are not written.
        path: The file.
        signature: Says which sizes vary.

    Raises:
        ExportError: torch.export can't take the folded graph as a program again, or can't write it.
    """
    axes = tuple(tuple(at for at, dim in enumerate(s.shape) if at and isinstance(dim, str)) for s in signature.inputs)
    buffer = io.BytesIO()
    with quiet(), torch.no_grad():
        try:
            program = export_flat(folded, inputs, axes)
            _strip(program)
            torch.export.save(program, buffer)
        except Exception as error:  # torch.export raises many unrelated classes
            raise ExportError(
                f"torch.export can't write the folded graph: {one_line(error)}",
                remedy="Leave this file out: pass --format onnx --format torchscript",
            ) from error
    write_atomically(path, buffer.getvalue())


def _strip(program: ExportedProgram) -> None:
    """Take out what no reader needs: lines and paths of the exporting machine, addresses of objects, example inputs.

    The examples would be a pickle inside the file; an absent one is an empty file to torch.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    program._example_inputs = None
