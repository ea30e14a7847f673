"""Which values of a graph of torch.export may share memory, so that a change of one in place is seen through the other."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten


def _overloads(*names: str) -> set[Any]:
    """All overloads of operators, where this version of torch has them."""
    packets = [getattr(aten, name, None) for name in names]
    return {getattr(packet, name) for packet in packets if packet is not None for name in packet.overloads()}


#: Operators made of others (so their schema says nothing of views) whose result is always memory of its own.
_FRESH = _overloads(
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul"),
    *(
        "batch_norm",
        "instance_norm",
        "group_norm",
        "layer_norm",
        "avg_pool1d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
    ),
    *("adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "softmax", "log_softmax"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d"),
    *(
        "upsample_trilinear3d",
        "upsample_bicubic2d",
        "prelu",
        "relu6",
        "selu",
        "scaled_dot_product_attention",
        "cosine_similarity",
    ),
    *("where", "square", "concat", "concatenate"),
)


def shares_memory(node: Node) -> bool:
    """Whether an operator's result may be memory of one of its arguments."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem  # one of the views that chunk, split or unbind return
    if any(item.alias_info is not None for item in schema.returns):
        return True
    if node.target in _FRESH:
        return False
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(schema.name + _suffix(schema), "CompositeImplicitAutograd")
    )


def _suffix(schema: Any) -> str:
    return f".{schema.overload_name}" if schema.overload_name else ""


def memory_of(node: Node) -> set[str | Node]:
    """Whose memory a value may be: targets of attributes, and nodes that made memory of their own."""
    found: set[str | Node] = set()
    stack, seen = [node], {node}
    while stack:
        item = stack.pop()
        if item.op == "get_attr":
            found.add(str(item.target))
        elif not shares_memory(item):
            found.add(item)
        else:
            for parent in item.all_input_nodes:
                if parent not in seen and isinstance(parent.meta.get("val"), Tensor | list | tuple):
                    seen.add(parent)
                    stack.append(parent)
    return found
