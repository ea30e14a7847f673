"""The affine map of a BatchNorm in eval mode, and its form after a change of layout.

In eval mode a BatchNorm is the affine map ``y = gamma * (x - moving_mean) / sqrt(moving_var + eps) + beta`` (Ioffe and
Szegedy 2015, algorithm 2), so ``scale = gamma / sqrt(moving_var + eps)`` and ``shift = beta - scale * moving_mean``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

#: A size (int), or the sympy expression of one that varies.
Dim = Any
#: Largest number of elements of a scale that is spread over merged axes (channels times height times width).
_MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class ChannelAffine:
    """``y = scale * x + shift`` per channel; both tensors are (channels,) float64."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def from_statistics(
        cls, mean: Tensor, var: Tensor, eps: float, gamma: Tensor | None = None, beta: Tensor | None = None
    ) -> ChannelAffine:
        """Return the affine of moving statistics and of the learned scale and shift, each (channels,).

        ``affine=False`` (gamma and beta None) means a scale of one and a shift of zero.
        """
        scale = torch.rsqrt(var.double() + eps)
        if gamma is not None:
            scale = gamma.double() * scale
        shift = -scale * mean.double()
        return cls(scale, shift if beta is None else beta.double() + shift)

    def on_axis(self, axis: int, rank: int) -> Affine:
        """Return the same map on a value of ``rank`` axes whose channels are on ``axis``."""
        shape = [1] * rank
        shape[axis] = -1
        return Affine(self.scale.reshape(shape), self.shift.reshape(shape))


@dataclass(frozen=True)
class Affine:
    """``y = scale * x + shift`` on a whole value, both float64 of one shape and of the value's rank.

    Each axis has the value's size, or 1 if scale and shift are constant along it.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor) -> Affine:
        """Return the map in the smallest shape that holds both tensors, which have one rank."""
        scale, shift = torch.broadcast_tensors(scale, shift)  # type: ignore[no-untyped-call]
        for axis in range(scale.ndim):
            if scale.shape[axis] > 1 and _constant(scale, axis) and _constant(shift, axis):
                scale, shift = scale.narrow(axis, 0, 1), shift.narrow(axis, 0, 1)
        return cls(scale, shift)

    @classmethod
    def identity(cls, rank: int) -> Affine:
        """Return the map that changes nothing."""
        ones = torch.ones([1] * rank, dtype=torch.float64)
        return cls(ones, torch.zeros_like(ones))

    @property
    def has_scale(self) -> bool:
        """True if any scale is not one."""
        return bool((self.scale != 1).any())

    @property
    def has_shift(self) -> bool:
        """True if any shift is not zero."""
        return bool((self.shift != 0).any())

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.scale.ndim

    def after(self, first: Affine) -> Affine:
        """Return the map ``x -> self(first(x))``."""
        return Affine.of(self.scale * first.scale, self.scale * first.shift + self.shift)

    def scale_alone(self) -> Affine:
        """Return the map without its shift."""
        return Affine.of(self.scale, torch.zeros_like(self.shift))

    def shift_alone(self) -> Affine:
        """Return the map without its scale."""
        return Affine.of(torch.ones_like(self.scale), self.shift)

    def equals(self, other: Affine) -> bool:
        """Return True if another map has the same tensors."""
        return torch.equal(self.scale, other.scale) and torch.equal(self.shift, other.shift)

    def varies_along(self, axis: int) -> bool:
        """Return True if the map differs between positions of an axis."""
        return self.scale.shape[axis] > 1

    @property
    def varying(self) -> list[int]:
        """The axes along which the map varies."""
        return [axis for axis in range(self.rank) if self.varies_along(axis)]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Affine:
        """Return the map after a change of layout, applied to scale and shift alike."""
        return Affine.of(change(self.scale), change(self.shift))

    def __call__(self, value: Tensor) -> Tensor:
        """Return the scaled and shifted value."""
        return self.scale.to(value) * value + self.shift.to(value)

    def channels(self, axis: int, size: int) -> ChannelAffine | None:
        """Return the map as one scale and shift per position of ``axis``; None if it varies along another axis."""
        if any(other != axis for other in self.varying) or self.scale.shape[axis] not in (1, size):
            return None
        return ChannelAffine(self.scale.reshape(-1).expand(size), self.shift.reshape(-1).expand(size))

    def reshaped(self, before: Sequence[Dim], after: Sequence[Dim]) -> Affine | None:
        """Return the map on a value that is reshaped from ``before`` to ``after``.

        None if an axis along which the map varies is merged with an axis of varying size.
        """
        sizes, target = list(self.scale.shape), [1] * len(after)
        for left, right in matching_axes(before, after):
            if all(self.scale.shape[axis] == 1 for axis in left):
                continue
            here, there = [before[axis] for axis in left], [after[axis] for axis in right]
            if not all(isinstance(size, int) for size in (*here, *there)):
                return None
            for axis in left:
                sizes[axis] = int(before[axis])
            for axis in right:
                target[axis] = int(after[axis])
        if torch.Size(sizes).numel() > _MAX_ELEMENTS:
            return None
        return self.mapped(lambda tensor: tensor.expand(sizes).reshape(target))


def is_finite(affine: Affine | ChannelAffine) -> bool:
    """Return True if every scale and every shift is finite."""
    return bool(torch.isfinite(affine.scale).all() and torch.isfinite(affine.shift).all())


def arithmetic(operator: str, constant: Tensor, *, first: bool, factor: float = 1.0) -> Affine | None:
    """Return ``x operator constant`` ("add", "sub", "mul", "div"), or ``constant operator x``; None for ``constant / x``.

    ``constant`` is placed on x by ``placed_on``, and is the first operand if ``first`` is True. ``factor`` is that of the
    second operand of a sum or difference (torch's alpha).
    """
    ones, zeros = torch.ones_like(constant), torch.zeros_like(constant)
    if operator == "sub":
        operator, factor = "add", -factor
    match operator, first:
        case "add", False:
            return Affine.of(ones, factor * constant)
        case "add", True:
            return Affine.of(factor * ones, constant)
        case "mul", _:
            return Affine.of(constant, zeros)
        case "div", False:
            return Affine.of(constant.reciprocal(), zeros)
        case _:
            return None


def placed_on(constant: Tensor, shape: Sequence[Dim | None]) -> Tensor | None:
    """Return a constant in float64 with as many axes as the value it is broadcast over; None if it would enlarge the value."""
    if constant.ndim > len(shape):
        return None
    placed = constant.reshape([*[1] * (len(shape) - constant.ndim), *constant.shape])
    fits = all(size == 1 or size == there for size, there in zip(placed.shape, shape, strict=True))
    return placed.double() if fits else None


def why_infinite(var: Tensor, eps: float) -> tuple[str, str]:
    """Return reason and hint for a BatchNorm whose scale or shift is not finite."""
    if bad := int((var + eps <= 0).sum()):
        why = f"its variance plus eps is not above 0 in {bad} channel{'s' * (bad > 1)}, so its scale is not finite"
        return why, "statistics with a variance and eps that are not both 0"
    return "its statistics or parameters contain infinity, NaN or numbers too large to multiply", "finite ones"


def matching_axes(before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes with the same number of elements into the finest runs of axes with the same number of elements."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        left, right = [i], [j]
        here, there = before[i], after[j]
        i, j = i + 1, j + 1
        while here != there and (i < len(before) or j < len(after)):
            if i < len(before) and (j >= len(after) or _smaller(here, there)):
                left.append(i)
                here, i = here * before[i], i + 1
            else:
                right.append(j)
                there, j = there * after[j], j + 1
        found.append((left, right))
    if found:  # the rest are axes of size 1
        found[-1][0].extend(range(i, len(before)))
        found[-1][1].extend(range(j, len(after)))
    return found


def _smaller(here: Dim, there: Dim) -> bool:
    if isinstance(here, int) and isinstance(there, int):
        return bool(here < there)
    ratio: Any = sympy.cancel(sympy.sympify(there) / sympy.sympify(here))
    return bool(ratio > 1) if ratio.is_number else True


def _constant(tensor: Tensor, axis: int) -> bool:
    return tensor.stride(axis) == 0 or bool((tensor == tensor.narrow(axis, 0, 1)).all())
