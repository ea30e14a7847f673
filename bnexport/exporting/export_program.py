"""torch.export's own file (.pt2), the successor of TorchScript, written from the folded graph."""

from __future__ import annotations

import io
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from bnexport.errors import ExportError
from bnexport.exporting.signature import export_flat, varying_axes
from bnexport.files import write_atomically
from bnexport.optional import one_line, quiet
from bnexport.tensors import Signature


def export_program(
    folded: GraphModule,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    signature: Signature,
    exported: Callable[[], ExportedProgram] | None = None,
) -> None:
    """Write ``model.pt2``, which ``torch.export.load(path).module()`` reads without bnexport; the same bytes each time.

    Outputs nested in a dict or a tuple are returned flat, in the order of the signature, as from ``model.pt``. The batch
    varies, and so do sizes with names in the signature.

    ``inputs`` are examples with a batch of at least 2, which are not written. ``exported`` returns ``export_flat`` of the
    network, which is changed; without it the graph is exported here.
    """
    buffer = io.BytesIO()
    with quiet(), torch.no_grad():
        try:
            program = exported() if exported else export_flat(folded, inputs, varying_axes(signature))
            _divide_in_whole_numbers(program.graph)
            _strip(program)
            torch.export.save(program, buffer)
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
