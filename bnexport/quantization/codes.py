"""Ranges of activations and their codes; weight codes that no kernel can saturate; biases corrected for their rounding.

The instruction VPMADDUBSW (AVX2, and AVX-512 without VNNI) adds two products of an unsigned and a signed byte in 16 bits, and
saturates. Which weights form a pair depends on the kernel. So a channel is safe in every order when its two largest codes of
one sign add up to at most 128: 255 * 128 = 32,640 < 32,767. Codes of at most 64 (``reduce_range``) are the special case.
Depthwise kernels of ONNX Runtime and OpenVINO add in 32 bits and are exempt, which a verification checks by running them. They
take one input channel for each output channel; grouped convolutions with more outputs than inputs have ordinary kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnexport.errors import ModelError
from bnexport.tensors import Array

#: Largest code of a weight; -128 is not used, so that the codes are symmetric.
LARGEST = 127
#: Largest sum of two codes of one sign: 255 * 128 fits in 16 bits with a sign, 255 * 129 does not.
PAIR = 128
#: A scale grows by this factor until the rounded codes obey.
_STEP = 1.002
#: Channels with at most this number of weights take the scale with the smallest error of their output among scales up to
#: 25 % larger. The error of more weights hardly depends on where their codes fall, and grows with the scale.
_FEW, _LARGER = 512, 1 + 0.005 * np.arange(1, 51)
#: Assumed correlation of the inputs of two taps of one channel: they are neighbours in an image or a feature map.
_ALIKE = 0.5
#: Largest code of a bias: int32 with room for the sum of products, which stays below 2 ** 30 for 33,000 taps.
_LARGEST_BIAS = 2.0**30
#: Operators whose output has the numbers of their first input.
MOVERS = ("MaxPool", "Pad", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Dropout")
#: Operators that a kernel computes together with the layer before them.
ABSORBED = ("Relu", "Clip")


@dataclass(frozen=True)
class Codes:
    """The int8 codes of a weight, output channels first, and one float32 scale for each output channel."""

    codes: Array
    scales: Array

    @property
    def values(self) -> Array:
        """Return codes * scales in float64, in the shape of the codes."""
        return self.codes.astype(np.float64) * _column(self.scales.astype(np.float64), self.codes.ndim)


def encode(weight: Array, *, pair_safe: bool, least: Array | None = None, corrected: bool = True) -> Codes:
    """Round a weight (out, ...) to int8 with one scale per output channel, not below ``least`` (out,); 0 has the code 0.

    The scale has the smallest error of the output only if the bias is corrected; otherwise the smallest scale is taken.
    """
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    scales = np.abs(flat).max(axis=1, initial=0.0) / LARGEST
    if pair_safe:
        scales = np.maximum(scales, _largest_pair(flat) / (PAIR + 0.49))
    scales = np.maximum(scales, 0.0 if least is None else least)
    scales = np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)
    while (unfit := _unfit(_rounded(flat, scales), pair_safe=pair_safe)).any():
        scales[unfit] *= np.float32(_STEP)
    if corrected and flat.shape[1] <= _FEW:
        scales = _least_error(flat, scales, weight.shape[1], pair_safe=pair_safe)
    return Codes(_rounded(flat, scales).astype(np.int8).reshape(weight.shape), scales)


def _least_error(flat: Array, scales: Array, channels: int, *, pair_safe: bool) -> Array:
    """Return the scale (out,) with the smallest error of each channel's output: the given one, or a larger one that fits.

    The variance of the error is that of inputs which are correlated between the taps of one input channel, and independent
    between channels.
    """
    best, least = scales, np.full(len(flat), np.inf)
    for factor in (1.0, *_LARGER):
        tried = (scales * factor).astype(np.float32)
        codes = _rounded(flat, tried)
        error = (codes * tried.astype(np.float64)[:, None] - flat).reshape(len(flat), channels, -1)
        found = (1 - _ALIKE) * (error**2).sum(axis=(1, 2)) + _ALIKE * (error.sum(axis=2) ** 2).sum(axis=1)
        better = (found < least) & ~_unfit(codes, pair_safe=pair_safe)
        best, least = np.where(better, tried, best), np.where(better, found, least)
    return np.asarray(best)


def _rounded(flat: Array, scales: Array) -> Array:
    return np.asarray(np.rint(flat / scales.astype(np.float64)[:, None]))


def _unfit(codes: Array, *, pair_safe: bool) -> Array:
    """Return which channels have a code or a pair that is too large."""
    unfit = np.abs(codes).max(axis=1, initial=0.0) > LARGEST
    return np.asarray(unfit | (_largest_pair(codes) > PAIR)) if pair_safe else unfit


def _largest_pair(flat: Array) -> Array:
    """Return for each row the sum of its two largest numbers of one sign, or the largest one alone."""
    if flat.shape[1] < 2:
        return np.asarray(np.abs(flat).max(axis=1, initial=0.0))
    found = []
    for side in (flat, -flat):
        top = np.partition(np.maximum(side, 0.0), flat.shape[1] - 2, axis=1)[:, -2:]
        found.append(top.sum(axis=1))
    return np.asarray(np.maximum(*found))


def is_depthwise(groups: int, shape: Sequence[int]) -> bool:
    """Return whether a weight (out, in / groups, ...) has a depthwise kernel: one input channel for each output channel."""
    return groups > 1 and tuple(shape[:2]) == (groups, 1)


def saturating_channels(codes: Array) -> Array:
    """Return which output channels of int8 codes (out, ...) can saturate 16 bits in some order of pairs."""
    flat = codes.reshape(len(codes), -1).astype(np.float64)
    return np.asarray(_largest_pair(flat) > PAIR)


def least_scales(bias: Array, input_scale: float) -> Array:
    """Return the smallest weight scale for each output channel with which the bias code fits into 32 bits."""
    return np.asarray(np.abs(bias) / (input_scale * _LARGEST_BIAS))


def correction(exact: Array, rounded: Array, mean: Array, groups: int, inside: Array | float = 1.0) -> Array:
    """Return the mean error (out,) of a layer's outputs by the rounding of its weights, to subtract from the bias.

    It is the sum over taps of (rounded - exact) * E[x] (Nagel et al. 2019, arXiv 1906.04721, section 4.2), for weights
    (out, in / groups, *kernel). ``mean`` is E[x] of each input channel (in,), or one number for all. Padding counts as 0:
    ``inside`` (*kernel) is the share of the output positions at which a tap is inside the input.
    """
    error = ((rounded - exact) * inside).reshape(len(exact), exact.shape[1], -1).sum(axis=2)  # (out, in / groups)
    return np.asarray((error * grouped(mean, len(exact), exact.shape[1], groups)).sum(axis=1))


def grouped(mean: Array, outputs: int, width: int, groups: int) -> Array:
    """Return the means (in,) as each output channel reads them: (out, in / groups)."""
    every = np.broadcast_to(mean, (width * groups,)) if mean.size == 1 else mean
    return np.repeat(every.reshape(groups, width), outputs // groups, axis=0)


def encode_bias(bias: Array, scales: Array) -> Array:
    """Return the int32 codes of a bias (out,) at the given scales (out,)."""
    return np.rint(bias.astype(np.float64) / scales.astype(np.float64)).astype(np.int32)


def _column(values: Array, rank: int) -> Array:
    return values.reshape(-1, *(1,) * (rank - 1))


@dataclass(frozen=True)
class Range:
    """The values that a tensor takes."""

    low: float  # Smallest value to represent
    high: float  # Largest value to represent
    mean: tuple[float, ...]  # E[x] of each channel, or one number for all
    source: str  # Origin: "BatchNorm", "derived from BatchNorm", "bounded by its operator", "pixels", "calibration"

    @property
    def is_zero(self) -> bool:
        """Return whether all values are 0, or too small for a float32 scale."""
        return not max(self.high, 0.0) - min(self.low, 0.0) > np.finfo(np.float32).tiny * 1e3

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"low": self.low, "high": self.high, "mean": list(self.mean), "source": self.source}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Range:
        """Read what ``to_json`` wrote."""
        mean = tuple(float(item) for item in value["mean"])
        return cls(float(value["low"]), float(value["high"]), mean, str(value["source"]))

    @classmethod
    def of(cls, low: float, high: float, mean: Array | Sequence[float], source: str) -> Range:
        """Return a range with numbers of six digits, as the manifest keeps them, so that a proof can repeat the rounding."""
        return cls(_short(low), _short(high), tuple(map(_short, np.atleast_1d(mean))), source)


def _short(value: float) -> float:
    return float(f"{float(value):.6g}") + 0.0  # no -0.0


@dataclass(frozen=True)
class Coding:
    """The codes of an activation, of uint8 or int8: value = scale * (code - zero)."""

    scale: np.float32
    zero: int
    signed: bool

    @property
    def limits(self) -> tuple[int, int]:
        """Return the smallest and the largest code."""
        return (-128, 127) if self.signed else (0, 255)

    @property
    def is_plain(self) -> bool:
        """True if the code is the value: pixels as uint8."""
        return (float(self.scale), self.zero, self.signed) == (1.0, 0, False)

    @property
    def zero_array(self) -> Array:
        """Return the zero point in the type of the codes."""
        return np.array(self.zero, np.int8 if self.signed else np.uint8)


def coding_of(name: str, found: Range, target: str) -> Coding:
    """Return the coding of a tensor; 0 always has a code.

    Raises:
        ModelError: The range is not finite.
    """
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if not np.isfinite(high - low) or not np.isfinite(found.mean).all():
        raise ModelError(
            f"the range of {name!r} is not finite ({found.source})", remedy="Check the network's weights and the images"
        )
    if found.is_zero:
        high = 1.0  # any scale represents 0 exactly
    if target == "tensorrt":  # reads symmetric S8 alone; CPUs get asymmetric U8, with one bit more for a ReLU's output
        return Coding(np.float32(max(-low, high) / 127), 0, signed=True)
    scale = np.float32((high - low) / 255)
    return Coding(scale, int(np.clip(np.rint(-low / float(scale)), 0, 255)), signed=False)
