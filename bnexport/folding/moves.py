"""How an affine crosses each kind of operation: one row per kind in PULL (against the data flow) and PUSH (with it)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnexport.folding.affine import Affine
from bnexport.folding.graph import (
    Add,
    Average,
    Clamp,
    Concat,
    Homogeneous,
    Identity,
    Kind,
    Layer,
    MaxPool,
    Mean,
    Multiply,
    Norm,
    Op,
    Opaque,
    Permute,
    PixelShuffle,
    Reorder,
    Reshape,
    Slice,
)
from bnexport.folding.moves_layout import (
    pull_add,
    pull_concat,
    pull_identity,
    pull_multiply,
    pull_permute,
    pull_pixels,
    pull_reorder,
    pull_reshape,
    pull_slice,
    push_add,
    push_concat,
    push_identity,
    push_multiply,
    push_permute,
    push_pixels,
    push_reorder,
    push_reshape,
    push_slice,
)
from bnexport.folding.moves_linear import pull_layer, push_layer
from bnexport.folding.moves_values import (
    pull_average,
    pull_clamp,
    pull_homogeneous,
    pull_max_pool,
    pull_mean,
    pull_norm,
    pull_opaque,
    push_average,
    push_clamp,
    push_homogeneous,
    push_max_pool,
    push_mean,
    push_norm,
    push_opaque,
)
from bnexport.folding.plan import Plan

Pull = Callable[[Plan, Op, Any, Affine], None]
Push = Callable[[Plan, Op, Any, int, Affine], None]

#: Kind -> how an affine after it goes before it.
PULL: dict[type[Kind], Pull] = {
    Layer: pull_layer,
    Norm: pull_norm,
    Identity: pull_identity,
    Reshape: pull_reshape,
    Permute: pull_permute,
    Reorder: pull_reorder,
    PixelShuffle: pull_pixels,
    Average: pull_average,
    Mean: pull_mean,
    MaxPool: pull_max_pool,
    Clamp: pull_clamp,
    Homogeneous: pull_homogeneous,
    Concat: pull_concat,
    Slice: pull_slice,
    Add: pull_add,
    Multiply: pull_multiply,
    Opaque: pull_opaque,
}

#: Kind -> how an affine before it goes after it.
PUSH: dict[type[Kind], Push] = {
    Layer: push_layer,
    Norm: push_norm,
    Identity: push_identity,
    Reshape: push_reshape,
    Permute: push_permute,
    Reorder: push_reorder,
    PixelShuffle: push_pixels,
    Average: push_average,
    Mean: push_mean,
    MaxPool: push_max_pool,
    Clamp: push_clamp,
    Homogeneous: push_homogeneous,
    Concat: push_concat,
    Slice: push_slice,
    Add: push_add,
    Multiply: push_multiply,
    Opaque: push_opaque,
}
