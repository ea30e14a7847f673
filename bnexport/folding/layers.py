"""Absorbers: the new weight of each kind of linear layer that absorbs a channel affine after it or before it.

For ``z = W x + b``: an affine after it gives ``s z + t = (s W) x + (s b + t)``, one before it ``W (s x + t) + b = (W s) x +
(W t + b)``. The kinds differ in the axes of the stored weight that hold the output's and the input's channels, and in
how groups cut them. All tensors are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Absorber:
    """The index arithmetic of one layout of weights."""

    # (weight, (out,) scale, groups) -> weight: each output channel scaled
    scale_outputs: Callable[[Tensor, Tensor, int], Tensor]
    # (weight, (in,) scale, groups) -> weight: the contribution of each input channel scaled
    scale_inputs: Callable[[Tensor, Tensor, int], Tensor]
    # (weight, (in,) shift, groups) -> (out,), the result of a constant input; (..., out) for a matrix with leading axes. None
    # if the result differs between positions.
    push_shift: Callable[[Tensor, Tensor, int], Tensor] | None


def _by_group(vector: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Spread a vector over the second axis of a weight whose first axis runs through the groups in turn."""
    rows = weight.shape[0] // groups
    spread = vector.reshape(groups, 1, -1).expand(groups, rows, -1).reshape(weight.shape[0], -1)
    return spread.reshape(*spread.shape, *[1] * (weight.ndim - 2))


def _rows_scaled(weight: Tensor, scale: Tensor, _groups: int) -> Tensor:
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def _columns_scaled(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    return weight * _by_group(scale, weight, groups)


def _rows_summed(weight: Tensor, shift: Tensor, groups: int) -> Tensor:
    return (weight * _by_group(shift, weight, groups)).reshape(weight.shape[0], -1).sum(1)


#: Layout of a weight -> absorber. A new kind of linear layer is a new row.
ABSORBERS: dict[str, Absorber] = {
    # (out, in / groups, *kernel): convolution; without a kernel a linear layer's (out, in)
    "rows": Absorber(_rows_scaled, _columns_scaled, _rows_summed),
    # (in, out / groups, *kernel): transposed convolution; output positions use different taps
    "transposed": Absorber(_columns_scaled, _rows_scaled, None),
    # (..., in, out): x @ W
    "right": Absorber(
        lambda weight, scale, _groups: weight * scale,
        lambda weight, scale, _groups: weight * scale.unsqueeze(-1),
        lambda weight, shift, _groups: torch.einsum("...io,i->...o", weight, shift),
    ),
    # (..., out, in): W @ x
    "left": Absorber(
        lambda weight, scale, _groups: weight * scale.unsqueeze(-1),
        lambda weight, scale, _groups: weight * scale,
        lambda weight, shift, _groups: torch.einsum("...oi,i->...o", weight, shift),
    ),
}


def channels_of(layout: str, shape: tuple[int, ...], groups: int) -> tuple[int, int]:
    """Return the (input, output) channels of a weight of this layout and shape."""
    match layout:
        case "rows":
            return shape[1] * groups, shape[0]
        case "transposed":
            return shape[0], shape[1] * groups
        case "right":
            return shape[-2], shape[-1]
        case _:
            return shape[-1], shape[-2]
