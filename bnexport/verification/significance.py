"""Whether two classifiers differ in accuracy, on the same labelled samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnexport.tensors import Array

#: Probability below which a change of accuracy is no accident. One verification makes a handful of these tests.
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class AccuracyChange:
    """Of n labelled samples, how many each side gets right.

    Attributes:
        n: Samples.
        reference: Right by the reference.
        candidate: Right by the candidate.
        lost: Right by the reference alone.
        won: Right by the candidate alone.
        p: Two-sided exact p-value of McNemar's test: how likely a split at least as uneven as lost : won is, when
            either side is as likely to be the right one.
    """

    n: int
    reference: int
    candidate: int
    lost: int
    won: int
    p: float

    def sentence(self) -> str:
        """As the report tells it."""
        return (
            f"{self.reference} of {self.n} labels right before, {self.candidate} after"
            f" ({self.lost} lost, {self.won} won; exact McNemar p = {self.p:.2g})"
        )


def accuracy_change(reference: Array, candidate: Array, labels: Array) -> AccuracyChange:
    """Compare scores (n, classes) of two sides with the true classes (n,)."""
    before, after = reference.argmax(axis=1) == labels, candidate.argmax(axis=1) == labels
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    return AccuracyChange(len(labels), int(before.sum()), int(after.sum()), lost, won, mcnemar(lost, won))


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p-value (McNemar, Psychometrika 12, 1947; binomial form): 1.0 where nothing changed."""
    n, fewer = lost + won, min(lost, won)
    # The terms are whole numbers of any size; only their ratio is a float.
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**n))
