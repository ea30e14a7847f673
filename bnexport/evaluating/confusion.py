"""Scores and true classes, batch by batch, to accuracy, loss and the confusion matrix; numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnexport.tensors import Array

#: The k of top-k, for networks with more than k classes.
TOP_K = 5
#: Two-sided 95 % of the normal distribution.
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class ClassScores:
    """One class against all others.

    Attributes:
        label: Its name.
        precision: Share of what was given this label that is this class; None when nothing was given it.
        recall: Share of this class that was given this label; None when there is no sample of it.
        f1: Harmonic mean of both, 2 tp / (2 tp + fp + fn); None when there is neither sample nor label.
        support: Samples of this class.
    """

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


class ConfusionCounts:
    """Counts over all samples so far; memory does not grow with them.

    Args:
        classes: Number of classes.

    Attributes:
        counts: int64 (classes, classes): row the true class, column the given one.
        n: Samples.
        top_hits: Samples whose true class is among the TOP_K largest scores.
    """

    def __init__(self, classes: int) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros((classes, classes), np.int64)
        self.n = 0
        self.top_hits = 0
        self._loss = 0.0

    def add(self, logits: Array, labels: Array) -> None:
        """Add a batch.

        Args:
            logits: (n, classes), finite; of equal scores the first class wins.
            labels: Integers (n,) from 0 to classes - 1.
        """
        exact, rows = logits.astype(np.float64), np.arange(len(logits))
        np.add.at(self.counts, (labels, exact.argmax(axis=1)), 1)
        true = exact[rows, labels][:, np.newaxis]
        before = np.arange(exact.shape[1]) < labels[:, np.newaxis]
        rank = ((exact > true) | ((exact == true) & before)).sum(axis=1)
        self.top_hits += int((rank < TOP_K).sum())
        largest = exact.max(axis=1)
        log_sum = largest + np.log(np.exp(exact - largest[:, np.newaxis]).sum(axis=1))
        self._loss += float((log_sum - true[:, 0]).sum())
        self.n += len(logits)

    @property
    def correct(self) -> int:
        """Samples whose largest score is that of their class."""
        return int(np.trace(self.counts))

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self._loss / self.n

    def top_accuracy(self) -> float | None:
        """Share of samples whose class is among the TOP_K best; None where there are not more classes than that."""
        return self.top_hits / self.n if len(self.counts) > TOP_K else None

    def classes(self, labels: tuple[str, ...]) -> tuple[ClassScores, ...]:
        """Precision, recall, F1 and support of each class."""
        hits, support, given = np.diag(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)
        return tuple(
            ClassScores(
                label,
                _ratio(hits[k], given[k]),
                _ratio(hits[k], support[k]),
                _ratio(2 * hits[k], given[k] + support[k]),
                int(support[k]),
            )
            for k, label in enumerate(labels)
        )


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share of n trials (Wilson, J. Am. Stat. Assoc. 22, 1927), without continuity correction."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return 0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half


def _ratio(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None
