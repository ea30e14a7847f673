"""The contents of a file: its operator set, its batch norms, the names that must stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import GraphProto, ModelProto, NodeProto

from bnexport.exporting.onnx_names import mentioned_inside, subgraphs
from bnexport.onnx_files.models import nodes

BATCH_NORM = "BatchNormalization"
_DEFAULT_DOMAIN = ("", "ai.onnx")


def opset_of(model: ModelProto) -> int:
    """Version of the default operator set; 0 when the file imports none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def label(node: NodeProto) -> str:
    """What a node is called in the account: its name, or that of its first output."""
    return node.name or next((name for name in node.output if name), node.op_type)


def is_default(node: NodeProto) -> bool:
    """Whether an operator is ONNX's own."""
    return node.domain in _DEFAULT_DOMAIN


def is_batch_norm(node: NodeProto) -> bool:
    """Whether a node has a row in the account."""
    return node.op_type == BATCH_NORM and is_default(node)


def count_batch_norms(model: ModelProto) -> int:
    """BatchNormalization nodes of all graphs and functions."""
    return sum(map(is_batch_norm, nodes(model)))


def inner_batch_norms(model: ModelProto) -> Iterator[tuple[NodeProto, str]]:
    """Each BatchNormalization outside the main graph, and where it is, as the end of a sentence."""
    for node in _inside(model.graph.node):
        if is_batch_norm(node):
            yield node, "the body of an If, Loop or Scan"
    for function in model.functions:
        for node in (*function.node, *_inside(function.node)):
            if is_batch_norm(node):
                yield node, f"the body of the function {function.name}"


def _inside(group: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in group:
        for graph in subgraphs(node):
            yield from graph.node
            yield from _inside(graph.node)


def pinned(graph: GraphProto) -> set[str]:
    """Names that must stay: the graph's outputs, and what graphs inside nodes mention."""
    inside = (name for node in graph.node for name in mentioned_inside(node))
    return {*(value.name for value in graph.output), *inside}
