"""Changed labels: sample by sample for the report, and whether two classifiers differ in accuracy on the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bnexport.runtimes.replay import scale
from bnexport.tensors import Array
from bnexport.verification.metrics import has_labels
from bnexport.verification.verdict import FlippedSample


def flipped_samples(
    candidate: Mapping[str, Array],
    reference: Mapping[str, Array],
    *,
    bound: float,
    labels: Array | None,
    scales: Mapping[str, float] | None = None,
) -> tuple[FlippedSample, ...]:
    """Samples whose top-1 label is not the reference's, in order; those of ``metrics.count_flips``, one by one.

    Args:
        candidate: Output name -> (n, ...).
        reference: Output name -> (n, ...), finite.
        bound: Allowed error of scale.
        labels: True classes (n,); None without.
        scales: Output name -> scale; default: that of ``reference``.
    """
    name = next((name for name, values in reference.items() if has_labels(values)), None)
    if name is None or name not in candidate or candidate[name].shape != reference[name].shape:
        return ()
    scores, given = reference[name].astype(np.float64), candidate[name].astype(np.float64)
    if not np.isfinite(given).all():
        return ()  # its row says so; a label among NaN is none
    of = (scales or {}).get(name) or scale(scores)
    before, after = scores.argmax(axis=1), given.argmax(axis=1)
    found = []
    for index in np.flatnonzero(before != after):
        best = np.sort(scores[index])[-2:]
        margin = float(best[1] - best[0]) / of
        found.append(
            FlippedSample(
                int(index),
                None if labels is None else int(labels[index]),
                int(before[index]),
                int(after[index]),
                margin,
                float(np.abs(given[index] - scores[index]).max()) / of,
                explained=margin <= 2 * bound,
            )
        )
    return tuple(found)


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
