"""The table of file formats in a bundle, with TorchScript and torch.export's own file (.pt2), its successor."""

from __future__ import annotations

import io
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT
from bnexport.errors import ExportError
from bnexport.exporting.export_onnx import export_onnx
from bnexport.exporting.signature import ExportJob, flat
from bnexport.files import write_atomically
from bnexport.optional import one_line, quiet


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


def export_program(job: ExportJob, path: Path) -> None:
    """Write ``model.pt2``, which ``torch.export.load(path).module()`` reads without bnexport; the same bytes each time.

    Outputs nested in a dict or a tuple are returned flat, in the order of the signature, as from ``model.pt``. The batch
    varies, and so do sizes with names in the signature. The job's program is changed; its example inputs are not written.
    """
    buffer = io.BytesIO()
    with quiet(), torch.no_grad():
        try:
            _divide_in_whole_numbers(job.program.graph)
            _strip(job.program)
            torch.export.save(job.program, buffer)
        except Exception as error:  # torch.export raises many unrelated classes
            raise ExportError(
                f"torch.export can't write the folded graph: {one_line(error)}",
                remedy="Leave this file out: pass --format onnx --format torchscript",
            ) from error
    write_atomically(path, buffer.getvalue())


def _divide_in_whole_numbers(graph: Graph) -> None:
    """Replace a rounded quotient of two sizes, as in TensorFlow's padding, by a division of whole numbers.

    torch.export traces ``math.ceil(size / 2)``, but its file format does not support it (torch 2.11 to 2.14). ``-(-size // 2)``
    is the same number, and exact for every size.
    """
    for node in list(graph.nodes):
        quotient = node.args[0] if node.target in (math.ceil, math.floor) else None
        if not isinstance(quotient, Node) or quotient.target is not operator.truediv or not _is_whole(quotient.args):
            continue
        above, below = quotient.args
        with graph.inserting_before(node):
            if node.target is math.ceil:
                result = _call(
                    graph, operator.neg, _call(graph, operator.floordiv, _call(graph, operator.neg, above), below)
                )
            else:
                result = _call(graph, operator.floordiv, above, below)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        if not quotient.users:
            graph.erase_node(quotient)


def _is_whole(items: Sequence[Any]) -> bool:
    return all(isinstance(_value(item), int | torch.SymInt) for item in items)


def _call(graph: Graph, function: Callable[..., Any], *items: Any) -> Node:
    """Return a call node with its value, from which the file declares the size."""
    made = graph.call_function(function, items)
    made.meta["val"] = function(*map(_value, items))
    return made


def _value(item: Any) -> Any:
    return item.meta.get("val") if isinstance(item, Node) else item


def _strip(program: ExportedProgram) -> None:
    """Remove parts that no reader needs: lines and paths of the exporting machine, addresses of objects, examples, guards.

    Example inputs would be a pickle inside the file. Guards are Python expressions that a reader would evaluate; the operators
    refuse sizes that do not fit.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    program._example_inputs = None
    program._guards_code = []


@dataclass(frozen=True)
class ExportFormat:
    """One kind of file: its name on the command line, its name in the bundle, and its writer."""

    name: str
    file: str
    write: Callable[[ExportJob, Path], None]


#: Every format. A new one is a new row.
FORMATS: tuple[ExportFormat, ...] = (
    ExportFormat("onnx", MODEL_ONNX, export_onnx),
    ExportFormat("torchscript", MODEL_TORCHSCRIPT, lambda job, path: export_torchscript(job.folded, path)),
    ExportFormat("exported-program", MODEL_EXPORTED, export_program),
)
