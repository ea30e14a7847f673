"""TorchScript: scripted and frozen from the folded graph."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from bnexport.errors import ExportError
from bnexport.exporting.signature import flat
from bnexport.files import write_atomically
from bnexport.optional import one_line


def export_torchscript(folded: GraphModule, path: Path) -> None:
    """Write ``model.pt``, which ``torch.jit.load`` reads without bnexport.

    TorchScript compiles the folded graph, a straight line of ATen calls; tracing would freeze every size that is computed from
    the batch. Freezing only turns parameters into constants: its numerical optimisations are off, so that the weights in the
    file are the folded weights bit for bit. Outputs nested in a dict or a tuple are returned flat, in the order of the
    bundle's signature.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated and warns at each call
        try:
            scripted = torch.jit.script(_scriptable(folded))
            scripted.eval()
            frozen = torch.jit.freeze(scripted, optimize_numerics=False)
            _follow_input(frozen.graph)
            buffer = io.BytesIO()
            torch.jit.save(frozen, buffer)
        except Exception as error:  # torch.jit raises RuntimeError, OSError and frontend errors
            raise ExportError(
                f"TorchScript can't compile the folded graph: {one_line(error)}",
                remedy="Export ONNX alone with --format onnx; that file does not depend on TorchScript",
            ) from error
    write_atomically(path, buffer.getvalue())


def _scriptable(folded: GraphModule) -> GraphModule:
    """Return a copy of the graph in TorchScript's terms: operators without overload, sizes by ``Tensor.size``.

    The device of an input is a constant again, so that freezing computes everything ahead that does not depend on the input.
    """
    module = flat(folded)
    for node in module.graph.nodes:
        if node.target is getattr and node.args[1] == "device":
            node.replace_all_uses_with(node.args[0].meta["val"].device)
        elif node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
    module.recompile()
    return module


def _follow_input(graph: Any) -> None:
    """Create every intermediate tensor on the device of the first input.

    Tracing writes the exporting machine's device into factories (``torch.zeros(..., device=x.device)``) and casts. Tensors that
    freezing computed ahead are constants of the file, which ``map_location`` moves.
    """
    calls = [(node, at) for node in _nodes(graph) if (at := _device_argument(node)) is not None]
    if not calls:
        return
    first = next(value for value in list(graph.inputs())[1:] if value.type().isSubtypeOf(torch._C.TensorType.get()))
    device = graph.create("prim::device", [first])
    device.output().setType(torch._C.DeviceObjType.get())
    device.insertBefore(next(iter(graph.nodes())))
    for node, at in calls:
        node.replaceInput(at, device.output())


def _device_argument(node: Any) -> int | None:
    """Return the position of an argument that fixes a device: a named device, or None if no tensor argument decides it."""
    if node.schema() == "(no schema)":
        return None
    names = [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]
    if "device" not in names:
        return None
    values = list(node.inputs())
    at = names.index("device")
    reads_tensor = any(value.type().isSubtypeOf(torch._C.TensorType.get()) for value in values)
    named = values[at].type().kind() == "DeviceObjType"
    return at if named or not reads_tensor else None


def _nodes(block: Any) -> Iterator[Any]:
    """Yield every node, including those in the blocks of branches and loops."""
    for node in list(block.nodes()):
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)
