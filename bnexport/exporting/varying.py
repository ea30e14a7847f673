"""The folded graph exported once more with plain inputs and outputs, and which of its dimensions vary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from bnexport.errors import ExportError
from bnexport.optional import one_line, quiet
from bnexport.tensors import Signature, TensorSpec, size_axes

BATCH = "batch"


def flat(folded: GraphModule) -> GraphModule:
    """A copy of the graph that takes and gives plain tensors in the signature's order, whatever forward nests them in.

    An output that is an input is copied: in a file every input and output has a name of its own.
    """
    graph = Graph()
    outputs = [item for item in pytree.tree_leaves(graph.graph_copy(folded.graph, {})) if item is not None]
    for index, node in enumerate(outputs):
        if isinstance(node, Node) and node.op == "placeholder":
            outputs[index] = graph.call_function(torch.ops.aten.clone.default, (node,))
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    return GraphModule(folded, graph)


def export_flat(folded: GraphModule, inputs: tuple[Tensor, ...], axes: tuple[tuple[int, ...], ...]) -> ExportedProgram:
    """``torch.export`` of the flat graph: the batch varies, and of each input the given axes.

    Args:
        folded: The folded network.
        inputs: Example inputs with a batch of at least 2: a batch of 1 would be taken for a constant.
        axes: Per input, what varies besides the batch.
    """
    batch = torch.export.Dim(BATCH)
    vary = torch.export.Dim.AUTO
    shapes = tuple(
        {0: batch, **dict.fromkeys(varying, vary)} if item.ndim else None
        for item, varying in zip(inputs, axes, strict=True)
    )
    return torch.export.export(flat(folded), inputs, dynamic_shapes=shapes)


def with_varying_sizes(plain: Signature, folded: GraphModule, inputs: tuple[Tensor, ...]) -> Signature:
    """A signature with names where the size of an image, or what depends on it, varies, and from which size on it holds.

    Inputs that must have the same height share its name; one of its own is called after its input. A dimension of an output
    that equals a size of an input has its name; another one that varies is called after its output.

    Args:
        plain: The signature for one size of image.
        folded: The folded network.
        inputs: Example inputs.

    Raises:
        ExportError: The graph can't be exported with varying sizes, or pins one.
    """
    axes = tuple(tuple(size_axes(item.ndim)) for item in inputs)
    with quiet(), torch.no_grad():
        try:
            program = export_flat(folded, inputs, axes)
        except Exception as error:  # torch.export raises many unrelated classes
            raise ExportError(
                f"the folded graph can't be exported with varying sizes: {one_line(error)}",
                remedy="Leave --dynamic-size out",
            ) from error
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    taken = [values[str(name)] for name in program.graph_signature.user_inputs]
    given = [values[str(name)] for name in program.graph_signature.user_outputs]
    names = {str(taken[0].shape[0]): BATCH}
    inputs_named = tuple(
        _named(spec, value, names, first=index == 0)
        for index, (spec, value) in enumerate(zip(plain.inputs, taken, strict=True))
    )
    traced = [node.meta["val"] for node in folded.graph.find_nodes(op="placeholder")]
    smallest: dict[str, int] = {}
    for spec, *values_of in zip(inputs_named, taken, traced, strict=True):
        for axis in size_axes(len(spec.shape)):
            if isinstance(dim := spec.shape[axis], str):
                smallest[dim] = max(smallest.get(dim, 1), *(_lower_bound(value.shape[axis]) for value in values_of))
    outputs_named = tuple(_named(spec, value, names) for spec, value in zip(plain.outputs, given, strict=True))
    return Signature(inputs_named, outputs_named).with_smallest(smallest)


def _lower_bound(size: Any) -> int:
    """From which size on the graph is forward for sure: torch.export follows ``if x.shape[2] > 40`` and windows."""
    if isinstance(size, int):
        return 1
    return int(size.node.shape_env.bound_sympy(size.node.expr).lower)


def _named(spec: TensorSpec, value: Any, names: dict[str, str], *, first: bool = False) -> TensorSpec:
    """A tensor with names for what varies; ``names`` says what each expression is called and grows."""
    words, shape = size_axes(value.ndim), []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            shape.append(spec.shape[axis])
            continue
        word = words.get(axis, f"dim{axis}")
        wanted = word if first else f"{spec.name}_{word}"
        if str(size) not in names and wanted in names.values():
            wanted = f"{spec.name}_{word}_{axis}"
        shape.append(names.setdefault(str(size), wanted))
    return replace(spec, shape=tuple(shape))
