"""The nodes of a linear layer with other tensors in them: what is evaluated in a proof and what is written are one."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto

from bnexport.onnx_folding.view import Slot


def with_tensors(
    nodes: Sequence[NodeProto], weight_at: Slot | None, bias_at: Slot | None, *, weight: str | None, bias: str | None
) -> list[NodeProto]:
    """Copies of a layer's nodes that read other tensors.

    Gemm multiplies its weight by alpha and its bias by beta; both are part of a folded tensor, so the factor goes.

    Args:
        nodes: Not changed.
        weight_at: Where the weight is read.
        bias_at: Where the bias is read, or would be.
        weight: Name of another weight; None leaves what is there.
        bias: Name of another bias; None leaves what is there.
    """
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    for place, name, factor in ((weight_at, weight, "alpha"), (bias_at, bias, "beta")):
        if place is None or name is None:
            continue
        node, slot = copies[place[0]], place[1]
        while len(node.input) <= slot:
            node.input.append("")
        node.input[slot] = name
        if node.op_type == "Gemm":
            kept = [item for item in node.attribute if item.name != factor]
            del node.attribute[:]
            node.attribute.extend(kept)
    return copies
