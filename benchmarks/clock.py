"""Repeated measurements of one thing, with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


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

    def to_json(self) -> dict[str, float]:
        """Return plain JSON values."""
        return asdict(self)
