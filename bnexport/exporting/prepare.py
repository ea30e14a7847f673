"""A folded network made ready for the exporters: its signature, and its graph without nesting."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from bnexport.errors import ExportError
from bnexport.tensors import DTYPES, Signature, TensorSpec

BATCH = "batch"


def signature_of(folded: GraphModule, inputs: tuple[Tensor, ...], *, input_names: tuple[str, ...]) -> Signature:
    """Run the network once and name what goes in and out.

    One output is called "logits", several "output_0", "output_1", ... in the order in which forward returns them.

    Args:
        folded: The folded network.
        inputs: Example inputs, batch first.
        input_names: One name per input.

    Raises:
        ExportError: An output that is no tensor, has no batch dimension, or an element type that no engine takes.
    """
    with torch.no_grad():
        outputs = pytree.tree_leaves(folded(*inputs))
    names = ("logits",) if len(outputs) == 1 else tuple(f"output_{index}" for index in range(len(outputs)))
    batch = inputs[0].shape[0]
    for name, output in zip(names, outputs, strict=True):
        if not isinstance(output, Tensor) or output.ndim == 0 or output.shape[0] != batch:
            what = f"has shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"is a {type(output).__name__}"
            raise ExportError(
                f"output {name!r} {what} for a batch of {batch}, so its first dimension is not the batch",
                remedy="Return tensors with the batch first; reduce over the batch outside the model",
            )
    return Signature(
        tuple(_spec(name, tensor) for name, tensor in zip(input_names, inputs, strict=True)),
        tuple(_spec(name, tensor) for name, tensor in zip(names, outputs, strict=True)),
    )


def flat(folded: GraphModule) -> GraphModule:
    """A copy of the graph that takes and gives plain tensors in the signature's order, whatever forward nests them in."""
    graph = Graph()
    outputs = pytree.tree_leaves(graph.graph_copy(folded.graph, {}))
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    return GraphModule(folded, graph)


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(
            f"{name!r} is {dtype}, which an exported file can't take or give", remedy=f"Use one of {', '.join(DTYPES)}"
        )
    return TensorSpec(name, dtype, (BATCH, *map(int, tensor.shape[1:])))
