"""Convolution and pooling in numpy, at the speed of its matrix product, in bounded memory.

Arrays are (n, channels, *size) for the caller. In memory the channels come first where a kernel chooses, (channels, n, *size):
a convolution is then one matrix product over all samples, and no result has to be transposed for the next one. numpy's
element-wise operators keep that order.

Hand-written on purpose: these kernels judge torch and ONNX Runtime, so they share no code with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnexport.tensors import Array

#: Elements of the unfolded windows of one matrix product. A small weight is fastest with windows that stay in the processor's
#: cache (2 MB in float64); a large one needs more columns, because each product reads it again, but no more than 16 MB.
_ROOM, _MOST_ROOM, _PER_WEIGHT = 1 << 18, 1 << 21, 8
#: Elements of one block of a depthwise convolution, whose sums over the taps stay in the processor's second cache.
_CACHED = 1 << 14


@dataclass(frozen=True)
class WindowAxis:
    """The windows along one spatial axis."""

    size: int  # Elements of the input
    kernel: int  # Taps of a window
    stride: int = 1  # Distance between two windows
    before: int = 0  # Padding before the input
    after: int = 0  # Padding after the input
    dilation: int = 1  # Distance between two taps
    ceil: bool = False  # True to round the number of windows up

    @property
    def span(self) -> int:
        """Return the elements that a window covers."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def count(self) -> int:
        """Return the number of windows; rounding up adds one only if it starts inside the input or the padding before it."""
        room = self.size + self.before + self.after - self.span
        count = (math.ceil(room / self.stride) if self.ceil else room // self.stride) + 1
        return count - 1 if self.ceil and (count - 1) * self.stride >= self.size + self.before else count

    def inside(self, *, counted: bool) -> Array:
        """Return how many taps of each window are inside the input, or inside input and padding if that is counted."""
        taps = np.arange(self.count)[:, None] * self.stride + np.arange(self.kernel) * self.dilation - self.before
        first, end = (-self.before, self.size + self.after) if counted else (0, self.size)
        found: Array = ((taps >= first) & (taps < end)).sum(axis=1)
        return found

    def reach(self, start: int, stop: int) -> tuple[int, int, int, int]:
        """Return the part of the input that windows ``start`` to ``stop`` see, and the padding before and after that part."""
        low, high = start * self.stride - self.before, (stop - 1) * self.stride + self.span - self.before
        first, end = min(max(low, 0), self.size), min(max(high, 0), self.size)
        return first, max(end, first), max(min(-low, high - low), 0), max(high - max(low, self.size), 0)

    def tap(self, number: int, windows: int) -> slice:
        """Return the places of one tap of ``windows`` windows in the padded part that they see."""
        first = number * self.dilation
        return slice(first, first + (windows - 1) * self.stride + 1, self.stride)


def axes_of(
    size: Sequence[int],
    kernel: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil: bool = False,
) -> tuple[WindowAxis, ...]:
    """Return the axes of a convolution or pooling from ONNX's attributes; ``pads`` has all beginnings, then all ends."""
    dims = len(kernel)
    strides, dilations = strides or (1,) * dims, dilations or (1,) * dims
    pads = pads if pads and auto_pad == "NOTSET" else (0,) * (2 * dims)
    axes = [
        WindowAxis(size[i], kernel[i], strides[i], pads[i], pads[dims + i], dilations[i], ceil=ceil)
        for i in range(dims)
    ]
    return tuple(_same(axis, auto_pad) if auto_pad.startswith("SAME") else axis for axis in axes)


def _same(axis: WindowAxis, auto_pad: str) -> WindowAxis:
    """Return an axis with ceil(size / stride) windows; an odd padding is larger at the side that the name states."""
    windows = -(-axis.size // axis.stride)
    total = max((windows - 1) * axis.stride + axis.span - axis.size, 0)
    less, more = total // 2, total - total // 2
    before, after = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    return WindowAxis(axis.size, axis.kernel, axis.stride, before, after, axis.dilation)


def convolution(x: Array, weight: Array, bias: Array | None, axes: tuple[WindowAxis, ...], groups: int = 1) -> Array:
    """Return a convolution: x (n, in, *size) and weight (out, in / groups, *kernel) to (n, out, *count).

    Blocks of windows are unfolded and multiplied by the weight. A depthwise convolution has too little work per element for
    that: it is a sum over the taps.
    """
    n, outputs = x.shape[0], weight.shape[0]
    counts = tuple(axis.count for axis in axes)
    if x.shape[1] != weight.shape[1] * groups or outputs % groups or min(counts) < 1:
        raise ValueError(f"an input of {x.shape} and {groups} groups do not fit a weight of {weight.shape}")
    y = np.empty((outputs, n, *counts), np.result_type(x, weight))
    x = x.swapaxes(0, 1)
    if groups > 1 and weight.shape[1] == 1:
        _sum_over_taps(x, weight, y, axes)
    else:
        _multiply_windows(x, weight, y, axes, groups)
    if bias is not None:
        y += bias.reshape(-1, *(1,) * (y.ndim - 1))
    result: Array = y.swapaxes(0, 1)
    return result


def _multiply_windows(x: Array, weight: Array, y: Array, axes: tuple[WindowAxis, ...], groups: int) -> None:
    """Fill y (out, n, *count) by matrix products; x is (in, n, *size)."""
    n, counts = y.shape[1], y.shape[2:]
    factors = weight.reshape(groups, y.shape[0] // groups, -1)
    sums = y.reshape(groups, factors.shape[1], -1)
    row = math.prod(counts[1:])
    room = room_of(weight.size)
    for samples, rows in _blocks(n, counts[0], x.shape[0] * math.prod(weight.shape[2:]) * row, room):
        windows = _windows(x[:, samples], rows, axes)
        order = (0, *range(2 + len(axes), windows.ndim), *range(1, 2 + len(axes)))
        unfolded = windows.transpose(order).reshape(groups, factors.shape[2], -1)  # (groups, in * kernel, n * count)
        start = (samples.start * counts[0] + rows.start) * row
        np.matmul(factors, unfolded, out=sums[..., start : start + unfolded.shape[2]])


def _sum_over_taps(x: Array, weight: Array, y: Array, axes: tuple[WindowAxis, ...]) -> None:
    """Fill y (in * multiplier, n, *count) of a depthwise convolution; x is (in, n, *size)."""
    channels, n = x.shape[:2]
    sums = y.reshape(channels, -1, *y.shape[1:])  # (in, multiplier, n, *count)
    factors = weight.reshape(channels, sums.shape[1], *weight.shape[2:])
    every = slice(0, y.shape[2])
    for chosen, samples in _blocks(channels, n, math.prod(y.shape[2:]) * sums.shape[1], _CACHED):
        windows = _windows(x[chosen, samples], every, axes)[:, None]
        part = sums[chosen, :, samples]
        scratch = np.empty(part.shape, y.dtype)
        for number, tap in enumerate(itertools.product(*(range(axis.kernel) for axis in axes))):
            place: Any = (..., *tap)
            factor = factors[chosen][place].reshape(*part.shape[:2], *(1,) * (part.ndim - 2))
            np.multiply(windows[place], factor, out=scratch if number else part)
            if number:
                np.add(part, scratch, out=part)


def room_of(weights: int) -> int:
    """Return the number of elements of unfolded windows in one product with a number of weights."""
    return max(_ROOM, min(_MOST_ROOM, _PER_WEIGHT * weights))


def _blocks(many: int, parts: int, cost: int, room: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of several whole items, or of some of the parts of one item if a whole item is too large.

    A part has ``cost`` elements, and a block at most ``room``.
    """
    room = max(room // max(cost, 1), 1)
    items, pieces = max(room // max(parts, 1), 1), max(min(room, parts), 1)
    for first in range(0, many, items):
        for start in range(0, max(parts, 1), pieces):
            yield slice(first, min(first + items, many)), slice(start, min(start + pieces, parts))


def _windows(x: Array, rows: slice, axes: tuple[WindowAxis, ...], outside: float = 0.0) -> Array:
    """Return a view of the windows of (c, n, *size): (c, n, *count, *kernel), with the first axis limited to ``rows``."""
    limits = [(rows.start, rows.stop), *((0, axis.count) for axis in axes[1:])]
    padded = _reached(x, axes, limits, outside)
    view = np.lib.stride_tricks.sliding_window_view(padded, [axis.span for axis in axes], axis=tuple(range(2, x.ndim)))
    starts = (slice(None, None, axis.stride) for axis in axes)
    return view[(slice(None), slice(None), *starts, *(slice(None, None, axis.dilation) for axis in axes))]


def _reached(x: Array, axes: tuple[WindowAxis, ...], limits: Sequence[tuple[int, int]], outside: float) -> Array:
    """Return the part of (c, n, *size) that windows see, with its padding; a view if there is none."""
    reaches = [axis.reach(*limit) for axis, limit in zip(axes, limits, strict=True)]
    seen = x[(slice(None), slice(None), *(slice(first, end) for first, end, _, _ in reaches))]
    if not any(before or after for _, _, before, after in reaches):
        return seen
    sizes = [end - first + before + after for first, end, before, after in reaches]
    padded = np.full((*x.shape[:2], *sizes), outside, x.dtype)
    padded[(slice(None), slice(None), *(slice(b, b + end - first) for first, end, b, _ in reaches))] = seen
    return padded


def transposed_convolution(
    x: Array, weight: Array, bias: Array | None, axes: tuple[WindowAxis, ...], more: Sequence[int], groups: int = 1
) -> Array:
    """Return a transposed convolution: x (n, in, *size) and weight (in, out / groups, *kernel) to (n, out, *size).

    Each tap of the kernel adds one matrix product to the places that it reaches. ``axes`` describe the input, their padding is
    cut from the result, and ``more`` is the additional size at the end of each axis.
    """
    n, dims = x.shape[0], len(axes)
    sizes = [axis.stride * (axis.size - 1) + rest + axis.span for axis, rest in zip(axes, more, strict=True)]
    taps = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, in / groups, out / groups, *kernel)
    y = np.zeros((groups, taps.shape[2], n, *sizes), np.result_type(x, weight))
    x = x.swapaxes(0, 1)
    cost = max(x.shape[0], y.shape[0] * y.shape[1]) * math.prod(x.shape[2:])
    for samples, _ in _blocks(n, 1, cost, _MOST_ROOM):
        part = x[:, samples].reshape(groups, taps.shape[1], -1)
        for tap in itertools.product(*(range(axis.kernel) for axis in axes)):
            place: Any = (..., *tap)
            product = np.matmul(taps[place].swapaxes(1, 2), part)
            places = tuple(axis.tap(number, axis.size) for axis, number in zip(axes, tap, strict=True))
            y[(slice(None), slice(None), samples, *places)] += product.reshape(*y.shape[:2], -1, *x.shape[2:])
    kept = tuple(slice(axis.before, size - axis.after) for axis, size in zip(axes, sizes, strict=True))
    result: Array = y.reshape(-1, n, *sizes)[(slice(None), slice(None), *kept)]
    if bias is not None:
        result = result + bias.reshape(-1, *(1,) * (dims + 1))
    return result.swapaxes(0, 1)


def max_pool(x: Array, axes: tuple[WindowAxis, ...]) -> Array:
    """Return the maximum over windows, never the padding: (n, channels, *size) to (n, channels, *count)."""
    return _pooled(x, axes, -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min, np.maximum)


def average_pool(x: Array, axes: tuple[WindowAxis, ...], *, counted: bool) -> Array:
    """Return the mean over windows: (n, channels, *size) to (n, channels, *count).

    Parts of windows outside of the padded input are never counted. ``counted`` counts the padding's zeros.
    """
    total = _pooled(x, axes, 0.0, np.add)
    for at, axis in enumerate(axes, 2):
        inside = axis.inside(counted=counted).astype(total.dtype)
        total /= inside.reshape([-1 if at == place else 1 for place in range(x.ndim)])
    return total


def _pooled(x: Array, axes: tuple[WindowAxis, ...], outside: Any, reduce: np.ufunc) -> Array:
    """Return the windows, reduced along one axis after the other, as a new array."""
    x = x.swapaxes(0, 1)
    for at, axis in enumerate(axes):
        whole = [WindowAxis(size, 1) for size in x.shape[2:]]
        whole[at] = axis
        seen = _reached(x, tuple(whole), [(0, item.count) for item in whole], outside)
        before = (slice(None),) * (2 + at)
        x = seen[(*before, axis.tap(0, axis.count))].copy(order="K")
        for number in range(1, axis.kernel):
            reduce(x, seen[(*before, axis.tap(number, axis.count))], out=x)
    result: Array = x.swapaxes(0, 1)
    return result
