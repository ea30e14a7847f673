"""Element types: ONNX's numbers, torch's, and tensors from one to the other."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from bnexport.folding.torch_backend.write import flushed
from bnexport.tensors import Array

TORCH: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}
ONNX: dict[torch.dtype, int] = {value: key for key, value in TORCH.items()}


def widened(tensor: TensorProto) -> Array:
    """A stored tensor as numpy: floats of any width in float64, anything else as it is."""
    array = numpy_helper.to_array(tensor)
    is_float = TORCH.get(tensor.data_type, torch.bool).is_floating_point
    return array.astype(np.float64) if is_float else array


def stored(name: str, value: Tensor, dtype: torch.dtype) -> TensorProto:
    """A float64 tensor as it is written: rounded once, subnormal results flushed."""
    cast = flushed(value, dtype).contiguous()
    raw = cast.reshape(-1).view(torch.uint8).numpy().tobytes() if cast.numel() else b""
    return TensorProto(name=name, dims=cast.shape, data_type=ONNX[dtype], raw_data=raw)
