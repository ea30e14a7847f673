"""Quantiles of call times with their intervals, and ratios of two variants, round by round.

The interval of a quantile is that of order statistics: the number of values below the p-quantile of independent values has the
binomial distribution B(n, p), so two ranks enclose the quantile with a known probability, whatever the distribution of the
times (David and Nagaraja, "Order Statistics", 7.1). The ratio of two variants is the median of their ratios per round, and its
interval is the same one: of 5 rounds it is the range, which holds the true median with 94 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Probability that the true quantile is below, and that it is above, its interval.
_TAIL = 0.025
#: Smallest number of calls of a p99: the largest of 300 calls is above it with 95 %.
LEAST_CALLS = 300
#: Smallest number of rounds: the range of 5 ratios holds their true median with 94 %.
LEAST_ROUNDS = 5
#: Rounds of networks that are fast enough. Many short rounds find smaller differences than a few long ones of the same time:
#: the disturbances by other programs last for longer than a round, so that they hit both variants.
ROUNDS = 50


@dataclass(frozen=True)
class Quantile:
    """A quantile of n values, with its 95 % interval.

    The interval ends at the smallest or largest value where n is too small for 95 %: at 300 to 367 calls for a p99, at 5
    rounds for a median.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def holds_one(self) -> bool:
        """Return True if a ratio does not differ from 1 measurably."""
        return self.low <= 1.0 <= self.high


def quantile(values: Sequence[float], share: float) -> Quantile:
    """Return the quantile of at least one value with its interval; ``share`` is 0.5 for the median."""
    ordered, n = sorted(values), len(values)
    rank = max(1, math.ceil(share * n - 1e-9))
    value = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2 if share == 0.5 else ordered[rank - 1]
    low, high = _ranks(n, share)
    return Quantile(float(value), float(ordered[low - 1]), float(ordered[high - 1]), n)


def p99(times: Sequence[float]) -> Quantile | None:
    """Return the 99th percentile of call times; None below LEAST_CALLS."""
    return quantile(times, 0.99) if len(times) >= LEAST_CALLS else None


def ratio(values: Sequence[float], base: Sequence[float]) -> Quantile:
    """Return the median ratio of two variants that were measured in the same rounds, with its interval."""
    return quantile([value / other for value, other in zip(values, base, strict=False)], 0.5)


def _ranks(n: int, share: float) -> tuple[int, int]:
    """Return the ranks, from 1, of the two values that enclose a quantile; the first and the last if n is too small."""
    k = np.arange(1, n + 1)
    steps = np.log(n - k + 1) - np.log(k) + math.log(share / (1 - share))
    below = np.cumsum(
        np.exp(n * math.log1p(-share) + np.concatenate([[0.0], np.cumsum(steps)]))
    )  # P(B <= 0), P(B <= 1), ...
    low = int(np.searchsorted(below, _TAIL, side="right"))  # the largest rank with P(B < rank) <= _TAIL
    high = int(np.searchsorted(below, 1 - _TAIL)) + 1
    return max(low, 1), min(high, n)
