"""Repeated measurements of one thing, with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The smallest, the median and the largest of n measurements; the smallest time is the least disturbed one."""

    low: float
    middle: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value; ValueError without any."""
        if not values:
            raise ValueError("a spread needs a value")
        return cls(min(values), statistics.median(values), max(values), len(values))

    @classmethod
    def ratio(cls, values: Iterable[float], base: Iterable[float]) -> Spread:
        """Return the spread of the ratios of two variants that were measured in the same rounds."""
        return cls.of([value / other for value, other in zip(values, base, strict=True)])
