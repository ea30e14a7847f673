"""BatchNormalization nodes of a file, names that must stay, and tensors converted between ONNX and torch."""

from __future__ import annotations

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor

from bnexport.folding.torch_backend.torch_writer import flushed
from bnexport.onnx_files.models import mentioned_inside, nodes
from bnexport.tensors import ELEMENT_TYPES, Array

BATCH_NORM = "BatchNormalization"
_DEFAULT_DOMAIN = ("", "ai.onnx")


def label(node: NodeProto) -> str:
    """Return a node's name in the fold report: its name, or that of its first output."""
    return node.name or next((name for name in node.output if name), node.op_type)


def is_default(node: NodeProto) -> bool:
    """Return True if an operator belongs to ONNX's default domain."""
    return node.domain in _DEFAULT_DOMAIN


def is_batch_norm(node: NodeProto) -> bool:
    """Return True if a node has a row in the report."""
    return node.op_type == BATCH_NORM and is_default(node)


def count_batch_norms(model: ModelProto) -> int:
    """Count the BatchNormalization nodes of all graphs and functions."""
    return sum(map(is_batch_norm, nodes(model)))


def pinned(graph: GraphProto) -> set[str]:
    """Return the names that must stay: the graph's outputs, and names that inner graphs read."""
    inside = (name for node in graph.node for name in mentioned_inside(node))
    return {*(value.name for value in graph.output), *inside}


#: TensorProto's number -> torch's element type: those of ``tensors.ELEMENT_TYPES``, and bfloat16.
TORCH: dict[int, torch.dtype] = {entry.onnx: getattr(torch, name) for name, entry in ELEMENT_TYPES.items()} | {
    int(TensorProto.BFLOAT16): torch.bfloat16
}
ONNX: dict[torch.dtype, int] = {value: key for key, value in TORCH.items()}


def widened(tensor: TensorProto) -> Array:
    """Return a stored tensor as numpy: floats of any width in float64, other types unchanged."""
    array = numpy_helper.to_array(tensor)
    is_float = TORCH.get(tensor.data_type, torch.bool).is_floating_point
    return array.astype(np.float64) if is_float else array


def stored(name: str, value: Tensor, dtype: torch.dtype) -> TensorProto:
    """Return a float64 tensor as it is written: rounded once, with subnormal results flushed to zero."""
    cast = flushed(value, dtype).contiguous()
    raw = cast.reshape(-1).view(torch.uint8).numpy().tobytes() if cast.numel() else b""
    return TensorProto(name=name, dims=cast.shape, data_type=ONNX[dtype], raw_data=raw)
