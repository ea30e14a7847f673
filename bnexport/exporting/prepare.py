"""A folded network made ready for the exporters: its signature, and its graph without nesting."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
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
        ExportError: A network in another precision than float32, an input with an output's name, one tensor returned twice,
            or an output that is no tensor, has no batch dimension, or has an element type that no engine takes.
    """
    _refuse_other_precisions(folded)
    with torch.no_grad():
        outputs = pytree.tree_leaves(folded(*inputs))
    names = ("logits",) if len(outputs) == 1 else tuple(f"output_{index}" for index in range(len(outputs)))
    if clash := set(names) & set(input_names):
        raise ExportError(f"{clash.pop()!r} names an input and an output", remedy="Name the input otherwise in --input")
    if len({id(output) for output in outputs}) < len(outputs):
        raise ExportError(
            "forward returns one tensor twice", remedy="Return it once: every output has a name of its own"
        )
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


def check_labels(signature: Signature, labels: tuple[str, ...] | None) -> None:
    """Refuse class names that are not one for each score; an output that is no row of scores says nothing of them.

    Raises:
        ExportError: Another number of labels than of scores.
    """
    shape = signature.outputs[0].sample_shape
    if labels is not None and len(signature.outputs) == 1 and len(shape) == 1 and shape[0] != len(labels):
        raise ExportError(
            f"there are {len(labels)} labels, the network gives {shape[0]} scores",
            remedy="Name every class in the order of the scores, one per line",
        )


def flat(folded: GraphModule) -> GraphModule:
    """A copy of the graph that takes and gives plain tensors in the signature's order, whatever forward nests them in.

    An output that is an input is copied: in a file every input and output has a name of its own.
    """
    graph = Graph()
    outputs = pytree.tree_leaves(graph.graph_copy(folded.graph, {}))
    for index, node in enumerate(outputs):
        if isinstance(node, Node) and node.op == "placeholder":
            outputs[index] = graph.call_function(torch.ops.aten.clone.default, (node,))
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    return GraphModule(folded, graph)


def _refuse_other_precisions(folded: GraphModule) -> None:
    """Say so at once, not by a failed verdict: its bounds are those of float32 kernels."""
    for name, tensor in folded.named_parameters():
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            raise ExportError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}; only networks that compute in float32 are exported",
                remedy="Call float() on the network before exporting it",
            )


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(
            f"{name!r} is {dtype}, which an exported file can't take or give", remedy=f"Use one of {', '.join(DTYPES)}"
        )
    return TensorSpec(name, dtype, (BATCH, *map(int, tensor.shape[1:])))
