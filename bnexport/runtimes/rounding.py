"""Rounding arrays to narrower binary formats: to nearest, ties to even, gradual underflow, overflow to infinity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnexport.tensors import Array

#: Type of an array -> the integer that holds its bit pattern, and how many of the bits are mantissa.
_PATTERNS: dict[Any, tuple[type[np.unsignedinteger[Any]], int]] = {
    np.dtype(np.float64): (np.uint64, 52),
    np.dtype(np.float32): (np.uint32, 23),
}


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Attributes:
        name: As people call it: "TF32".
        mantissa: Stored bits of the mantissa, without the hidden one.
        exponent: Bits of the exponent.
    """

    name: str
    mantissa: int
    exponent: int

    @property
    def smallest(self) -> float:
        """The smallest normal number; below it the steps stay the same (subnormals)."""
        return float(2.0 ** (2 - 2 ** (self.exponent - 1)))

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return float(2.0 ** (2 ** (self.exponent - 1) - 1)) * (2.0 - 2.0**-self.mantissa)

    @property
    def half_step(self) -> float:
        """The largest relative error of one rounding of a normal number: half a unit in the last place of 1."""
        return float(2.0 ** -(self.mantissa + 1))


FLOAT32 = Format("float32", 23, 8)
TF32 = Format("TF32", 10, 8)
FLOAT16 = Format("float16", 10, 5)
BFLOAT16 = Format("bfloat16", 7, 8)


def round_to(array: Array, to: Format) -> Array:
    """The nearest number of a format for each element, in the array's own type; a new array.

    One rounding straight from float64: by way of float32 a number close to a tie could go the wrong way.

    Args:
        array: float64 or float32 of any shape. Infinities and NaN stay what they are.
        to: No wider than float32.
    """
    if to == FLOAT32:  # the processor's own conversion does the same
        with np.errstate(over="ignore", invalid="ignore"):
            return np.array(array.astype(np.float32), dtype=array.dtype)
    rounded = _shortened(array, to.mantissa)
    size = np.abs(array)
    if (small := size < to.smallest).any():
        step = array.dtype.type(to.smallest * 2.0**-to.mantissa)
        rounded[small] = np.rint(array[small] / step) * step
    if not np.max(size, initial=0.0) <= to.largest:  # also where there is a NaN
        with np.errstate(invalid="ignore"):
            rounded[np.abs(rounded) > to.largest] *= np.inf
        odd = ~np.isfinite(array)
        rounded[odd] = array[odd]
    return rounded


def cut_to(array: Array, to: Format) -> Array:
    """The number of a format that is next towards zero: its last bits are dropped; a new array of the array's own type.

    Args:
        array: float32 of any shape.
        to: A format with float32's exponents, so that nothing but the mantissa is lost.
    """
    pattern = np.array(array, np.float32, order="C", copy=True, ndmin=1).view(np.uint32)
    pattern &= np.uint32(np.iinfo(np.uint32).max - ((1 << (FLOAT32.mantissa - to.mantissa)) - 1))
    return pattern.view(np.float32).reshape(array.shape)


def step_of(array: Array, of: Format) -> Array:
    """Size of a unit in the last place of each element (of the smallest normal number for what is below it), float64.

    Args:
        array: Finite numbers of the format.
        of: The format.
    """
    _, exponent = np.frexp(
        np.maximum(np.abs(array.astype(np.float64)), of.smallest)
    )  # |x| in 2 ** [exponent - 1, exponent)
    return np.asarray(np.ldexp(1.0, exponent - 1 - of.mantissa))


def _shortened(array: Array, mantissa: int) -> Array:
    """With the mantissa's last bits rounded away: half a step is added to the bit pattern, a little less for even.

    A carry out of the mantissa goes into the exponent, which is the right answer.
    """
    integer, stored = _PATTERNS[array.dtype]
    bits = stored - mantissa
    rest = (1 << bits) - 1
    pattern = np.array(array, order="C", copy=True, ndmin=1).view(integer)
    even = (pattern >> integer(bits)) & integer(1)
    pattern += even + integer(rest >> 1)
    pattern &= integer(np.iinfo(integer).max - rest)
    return np.asarray(pattern.view(array.dtype).reshape(array.shape))
