"""How each ATen operator is read into a kind of folding's graph: one table."""

from __future__ import annotations

import operator
from typing import Any

import torch

from bnexport.folding.torch_readers_linear import read_addmm, read_conv, read_linear, read_product
from bnexport.folding.torch_readers_values import (
    read_averaging,
    read_cast,
    read_channel_shuffle,
    read_clamp,
    read_concat,
    read_dropout,
    read_homogeneous,
    read_index_select,
    read_max_pool,
    read_mean,
    read_pad,
    read_permute,
    read_piece,
    read_pixels,
    read_pool,
    read_reshape,
    read_same,
    read_slice,
    read_sum,
    read_times,
)
from bnexport.folding.torch_reading import Reader

aten = torch.ops.aten


def _named(*names: str) -> list[Any]:
    """Operators by name, where this version of torch has them."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet, None), overload or "default", None)
        if operation is not None:
            found.append(operation)
    return found


#: Operator -> reader. A new operation that an affine can cross is a new row.
READERS: dict[Any, Reader] = {
    **dict.fromkeys(_named("conv1d", "conv1d.padding"), read_conv(1)),
    **dict.fromkeys(_named("conv2d", "conv2d.padding"), read_conv(2)),
    **dict.fromkeys(_named("conv3d", "conv3d.padding"), read_conv(3)),
    aten.conv_transpose1d.default: read_conv(1, True),
    aten.conv_transpose2d.input: read_conv(2, True),
    aten.conv_transpose3d.input: read_conv(3, True),
    aten.linear.default: read_linear,
    **dict.fromkeys(_named("matmul", "mm", "bmm"), read_product),
    aten.addmm.default: read_addmm,
    **dict.fromkeys(_named("alias", "clone", "contiguous", "detach", "lift_fresh_copy"), read_same),
    **dict.fromkeys(_named("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), read_dropout),
    **dict.fromkeys(_named("_to_copy", "to.dtype", "to.dtype_layout", "to.device", "type_as"), read_cast),
    **dict.fromkeys(
        _named(
            *("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten.using_ints", "unflatten.int"),
            *("squeeze", "squeeze.dim", "squeeze.dims", "unsqueeze"),
        ),
        read_reshape,
    ),
    **dict.fromkeys(_named("permute", "transpose.int", "t"), read_permute),
    **dict.fromkeys(_named("channel_shuffle", "native_channel_shuffle"), read_channel_shuffle),
    aten.index_select.default: read_index_select,
    aten.pixel_shuffle.default: read_pixels(False),
    aten.pixel_unshuffle.default: read_pixels(True),
    aten.slice.Tensor: read_slice,
    operator.getitem: read_piece,
    **dict.fromkeys(_named("cat", "concat", "concatenate"), read_concat),
    aten.avg_pool1d.default: read_pool(1),
    aten.avg_pool2d.default: read_pool(2),
    aten.avg_pool3d.default: read_pool(3),
    aten.adaptive_avg_pool1d.default: read_averaging(1),
    aten.adaptive_avg_pool2d.default: read_averaging(2),
    aten.adaptive_avg_pool3d.default: read_averaging(3),
    **dict.fromkeys(
        _named("upsample_nearest1d.vec", "upsample_linear1d.vec", "_upsample_nearest_exact1d.vec"), read_averaging(1)
    ),
    **dict.fromkeys(
        _named(
            *(
                "upsample_nearest2d.vec",
                "_upsample_nearest_exact2d.vec",
                "upsample_bilinear2d.vec",
                "upsample_bicubic2d.vec",
            ),
            *("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec"),
        ),
        read_averaging(2),
    ),
    **dict.fromkeys(
        _named("upsample_nearest3d.vec", "upsample_trilinear3d.vec", "_upsample_nearest_exact3d.vec"), read_averaging(3)
    ),
    **dict.fromkeys(_named("mean", "mean.dim"), read_mean),
    **dict.fromkeys(_named("pad", "constant_pad_nd"), read_pad),
    aten.max_pool1d.default: read_max_pool(1),
    aten.max_pool2d.default: read_max_pool(2),
    aten.max_pool3d.default: read_max_pool(3),
    aten.relu.default: read_clamp(0.0, None),
    aten.relu6.default: read_clamp(0.0, 6.0),
    aten.hardtanh.default: read_clamp((1, "min_val", -1.0), (2, "max_val", 1.0)),
    aten.clamp.default: read_clamp((1, "min"), (2, "max")),
    aten.clamp_min.default: read_clamp((1, "min"), None),
    aten.clamp_max.default: read_clamp(None, (1, "max")),
    **dict.fromkeys(_named("leaky_relu", "prelu"), read_homogeneous),
    aten.add.Tensor: read_sum(1.0),
    aten.sub.Tensor: read_sum(-1.0),
    aten.mul.Tensor: read_times(False),
    aten.div.Tensor: read_times(True),
}
