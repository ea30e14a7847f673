"""Repeated times with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        low: The smallest: of times the one least disturbed.
        middle: The median.
        high: The largest.
        n: How many.
    """

    low: float
    middle: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value.

        Raises:
            ValueError: There is none.
        """
        if not values:
            raise ValueError("a spread needs a value")
        return cls(min(values), statistics.median(values), max(values), len(values))

    def to_json(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"low": self.low, "middle": self.middle, "high": self.high, "n": self.n}
