"""Accuracy, loss and confusion matrix from scores and true classes, batch by batch; needs numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bnexport.tensors import Array

#: The k of top-k, for networks with more than k classes.
TOP_K = 5
#: Two-sided 95 % of the normal distribution.
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class against all others."""

    label: str  # Class name
    precision: float | None  # Share of the predictions of this class that are right; None without a prediction
    recall: float | None  # Share of the samples of this class that are predicted right; None without a sample
    f1: float | None  # Harmonic mean of both, 2 tp / (2 tp + fp + fn); None without a sample and a prediction
    support: int  # Samples of this class


class ConfusionCounts:
    """Counts over all samples so far, in memory that depends on the number of classes only."""

    def __init__(self, classes: int) -> None:
        # Row: true class; column: predicted class
        self.counts: npt.NDArray[np.int64] = np.zeros((classes, classes), np.int64)
        self.n = 0  # Samples
        self.top_hits = 0  # Samples whose true class is among the TOP_K largest scores
        self._loss = 0.0

    def add(self, logits: Array, labels: Array) -> None:
        """Add a batch: finite logits (n, classes) and true classes (n,); the first of equal scores is the prediction."""
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
        """Number of samples whose largest score is that of their class."""
        return int(np.trace(self.counts))

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self._loss / self.n

    def top_accuracy(self) -> float | None:
        """Return the share of samples whose class is among the TOP_K best; None for at most TOP_K classes."""
        return self.top_hits / self.n if len(self.counts) > TOP_K else None

    def classes(self, labels: tuple[str, ...]) -> tuple[ClassScores, ...]:
        """Return precision, recall, F1 and support of each class."""
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
    """Return the 95 % score interval of a share of n trials (Wilson, J. Am. Stat. Assoc. 22, 1927; not corrected)."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return 0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half


def _ratio(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None
