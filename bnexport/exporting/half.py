"""The folded network in half precision: weights and arithmetic in float16 or bfloat16, inputs and outputs unchanged."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bnexport.errors import ExportError
from bnexport.optional import one_line

#: Name of a precision (``bundle.STORED_PRECISIONS``) -> element type of the folded network's weights and arithmetic.
PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,  # an int8 file is made from the float32 file
}


def in_precision(folded: GraphModule, inputs: tuple[Tensor, ...], precision: str) -> GraphModule:
    """Return a copy of the folded graph that computes in another precision, with inputs and outputs of the same types.

    Each weight is rounded once, from the folded float32 weight. Float inputs are cast at the start and float outputs at the
    end, so that the tensors of clients and servers stay float32 in every precision. ``folded`` is not changed. An ExportError
    reports a weight that is too large for the precision, and an operator that does not support it.
    """
    dtype = PRECISIONS[precision]
    if dtype is torch.float32:
        return folded
    module = copy.deepcopy(folded)
    _refuse_overflow(module, dtype)
    module.to(dtype)
    kinds = _output_kinds(folded, inputs)
    _cast_inputs(module, inputs, dtype)
    _cast_inside(module, dtype)
    _cast_outputs(module, kinds)
    module.recompile()
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception as error:  # torch raises many unrelated classes for an operator that a type lacks
        raise ExportError(
            f"the network can't run in {precision}: {one_line(error)}", remedy="Leave --precision out"
        ) from error
    return module


def _refuse_overflow(module: GraphModule, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        finite = torch.where(torch.isinf(tensor), 0.0, tensor.detach())  # an infinity, as of a mask, stays one
        if (largest := float(finite.abs().max())) > most:
            raise ExportError(
                f"{name} contains {largest:.3g}, and the largest {str(dtype).removeprefix('torch.')} number is {most:.3g}",
                remedy="Use --precision bfloat16, or leave --precision out",
            )


def _output_kinds(folded: GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, torch.dtype]:
    """Return the element type of every node by its name."""
    found: dict[str, torch.dtype] = {}

    class Look(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                found[n.name] = value.dtype
            return value

    with torch.no_grad():
        Look(folded).run(*inputs)
    return found


def _cast_inputs(module: GraphModule, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, example in zip(placeholders, inputs, strict=True):
        if not example.is_floating_point():
            continue
        with module.graph.inserting_after(node):
            cast = _cast(module, node, dtype)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, own=cast: user is not own)


def _cast_inside(module: GraphModule, dtype: torch.dtype) -> None:
    """Replace float32 in the arguments of nodes (a cast, a tensor of zeros) by the new type."""
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(dtype if item is torch.float32 else item for item in node.args)
            node.kwargs = {key: dtype if item is torch.float32 else item for key, item in node.kwargs.items()}


def _cast_outputs(module: GraphModule, kinds: dict[str, torch.dtype]) -> None:
    output = next(node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(output):
        cast = {
            node: _cast(module, node, torch.float32)
            for node in output.all_input_nodes
            if kinds.get(node.name) is torch.float32
        }
    for node, wide in cast.items():
        output.replace_input_with(node, wide)


def _cast(module: GraphModule, node: Node, dtype: torch.dtype) -> Node:
    return module.graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
