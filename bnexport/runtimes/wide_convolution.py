"""Convolutions of torch in float64 as matrix products: torch's own kernels take up to three times as long.

Measured with torch 2.14.1 on one thread whose matrix product reaches 39 GFLOP/s: 3x3 with 64 channels at 56x56 14 GFLOP/s, 7x7
with 3 channels 10, 3x3x3 8. Convolutions of one tap, grouped ones and those of one dimension are fast enough and stay torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bnexport.onnx_files import kernels

_ATEN = torch.ops.aten
#: Operator -> the place of ``transposed`` among its arguments; None: it is never transposed. In inference mode torch dispatches
#: conv2d and conv3d, otherwise the operators inside them.
_OPERATORS = {_ATEN.conv2d.default: None, _ATEN.conv3d.default: None, _ATEN.convolution.default: 6}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class wide_convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call] # noqa: N801 -- as torch.inference_mode is used
    """Computes dense float64 convolutions on the CPU by matrix products inside the block, also those of TorchScript."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or its replacement."""
        if func in _OPERATORS and (given := _dense(func, args, kwargs or {})) is not None:
            return _convolve(*given)
        return func(*args, **(kwargs or {}))


def _dense(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return input, weight, bias, stride, padding and dilation of a convolution that is replaced; None for any other."""
    at = _OPERATORS[func]
    if kwargs or (at is not None and args[at]):
        return None
    names = _NAMES if at is None else (*_NAMES[:6], "transposed", "more", "groups")
    found = {
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        **dict(zip(names, args, strict=False)),
    }
    x, weight, bias = found["input"], found["weight"], found["bias"]
    taps = math.prod(weight.shape[2:])
    plain = x.dtype is weight.dtype is torch.float64 and x.device.type == "cpu" and x.ndim == weight.ndim >= 4
    if not plain or found["groups"] != 1 or taps == 1 or 0 in x.shape or x.shape[1] != weight.shape[1]:
        return None
    dims = x.ndim - 2
    steps = [_numbers(found[name], dims) for name in ("stride", "padding", "dilation")]
    return x, weight, bias, *steps


def _numbers(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    n, channels, *size = x.shape
    outputs, _, *kernel = weight.shape
    counts = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(len(size))]
    if min(counts) < 1:
        raise RuntimeError(f"a kernel of {kernel} is larger than the padded input of {size}")
    factors = weight.reshape(outputs, -1)
    row = factors.shape[1] * math.prod(counts[1:])
    room = kernels.room_of(factors.numel())
    samples, rows = max(room // (row * counts[0]), 1), min(max(room // row, 1), counts[0])
    y = x.new_empty((n, outputs, *counts))
    for first in range(0, n, samples):
        part = functional.pad(x[first : first + samples], [p for p in reversed(padding) for _ in range(2)])
        steps = part.stride()
        taps = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
        moves = [step * s for step, s in zip(steps[2:], stride, strict=True)]
        for start in range(0, counts[0], rows):
            shape = (len(part), min(rows, counts[0] - start), *counts[1:])
            seen = part[:, :, start * stride[0] :]
            windows = seen.as_strided((channels, *kernel, *shape), (steps[1], *taps, steps[0], *moves))
            product = factors @ windows.reshape(factors.shape[1], -1)
            target = y[first : first + samples, :, start : start + rows]
            target.copy_(product.view(outputs, *shape).transpose(0, 1))
    return y if bias is None else y.add_(bias.view(-1, *(1,) * len(size)))
