"""The range and the means of a tensor, where they came from, and the codes that they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnexport.errors import ModelError
from bnexport.tensors import Array


@dataclass(frozen=True)
class Range:
    """The values that a tensor takes.

    Attributes:
        low: Smallest value to represent.
        high: Largest value to represent.
        mean: E[x] of each channel, or one number for all.
        source: Origin: "BatchNorm", "derived from BatchNorm", "pixels", "calibration".
    """

    low: float
    high: float
    mean: tuple[float, ...]
    source: str

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
    """The codes of an activation: value = scale * (code - zero), of uint8 or int8."""

    scale: np.float32
    zero: int
    signed: bool

    @property
    def limits(self) -> tuple[int, int]:
        """Return the smallest and the largest code."""
        return (-128, 127) if self.signed else (0, 255)

    @property
    def zero_array(self) -> Array:
        """Return the zero point in the type of the codes."""
        return np.array(self.zero, np.int8 if self.signed else np.uint8)


def coding_of(name: str, found: Range, target: str) -> Coding:
    """Return the coding of a tensor; 0 always has a code.

    Raises:
        ModelError: The range has no width, or is not finite.
    """
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if not np.isfinite(high - low) or not np.isfinite(found.mean).all():
        raise ModelError(
            f"the range of {name!r} is not finite ({found.source})", remedy="Check the network's weights and the images"
        )
    if not high - low > np.finfo(np.float32).tiny * 1e3:
        raise ModelError(
            f"the range of {name!r} has no width: all its values are {high:g} ({found.source})",
            remedy="Give images that differ with --calibrate, or leave its layer in float with --float-layers",
        )
    if target == "tensorrt":  # reads symmetric S8 alone; CPUs get asymmetric U8, with one bit more for a ReLU's output
        return Coding(np.float32(max(-low, high) / 127), 0, signed=True)
    scale = np.float32((high - low) / 255)
    return Coding(scale, int(np.clip(np.rint(-low / float(scale)), 0, 255)), signed=False)
