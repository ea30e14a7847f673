"""Measure differences of outputs and labels, sample by sample and in accuracy, without a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bnexport.runtimes.replay import incomparable, scale
from bnexport.tensors import Array
from bnexport.verification.verdict import FlippedSample, Flips


@dataclass(frozen=True)
class Measurement:
    """Distance of a candidate from its reference."""

    #: max |candidate - reference| / scale of the worst output; scale is max |reference|, or 1 (so that the error is
    #: absolute) where a reference is all zeros
    error: float = 0.0
    max_abs: float = 0.0  # max |candidate - reference|
    rms: float = 0.0  # Root mean square of candidate - reference, of the worst output
    n: int = 0  # Samples compared
    #: Reason why the numbers mean nothing (missing output, other shape, nothing to compare, not finite); else ""
    problem: str = ""
    flips: Flips | None = None  # Top-1 labels of the first output that holds one score per class; None without one


def measure(
    candidate: Mapping[str, Array],
    reference: Mapping[str, Array],
    *,
    bound: float,
    scales: Mapping[str, float] | None = None,
) -> Measurement:
    """Compare every output (n, ...) of the reference; ``bound``, the allowed error of scale, is for the margin certificate."""
    if not reference:
        return Measurement(problem="there are no outputs to compare")
    parts = []
    for name, expected in reference.items():
        if name not in candidate:
            return Measurement(problem=f"output {name!r} is missing")
        if (problem := incomparable(name, candidate[name], expected)) is not None:
            return Measurement(n=len(expected) if expected.ndim else 0, problem=problem)
        difference = candidate[name].astype(np.float64) - expected.astype(np.float64)
        max_abs, rms = float(np.abs(difference).max()), float(np.sqrt(np.mean(np.square(difference))))
        parts.append(Measurement(max_abs / _scale_of(name, expected, scales), max_abs, rms, len(expected)))
    worst = max(parts, key=lambda part: part.error)
    flips: Flips | None = None
    if (scored := labelled(reference)) is not None:
        scores = reference[scored]
        flips = count_flips(candidate[scored], scores, bound=bound, of=_scale_of(scored, scores, scales))
    return Measurement(worst.error, max(part.max_abs for part in parts), worst.rms, worst.n, "", flips)


def count_flips(candidate: Array, reference: Array, *, bound: float, of: float | None = None) -> Flips:
    """Compare top-1 labels (n, classes), with the margin certificate.

    The allowed error of a score is ``bound`` times the scale ``of`` (default: the reference's). If the reference's best score
    leads by more than twice the allowed error, the label can't change: one score would have to fall, and another rise, by
    the allowed error.
    """
    firm = _margins(reference) > 2 * bound * (scale(reference) if of is None else of)
    flipped = candidate.argmax(axis=1) != reference.argmax(axis=1)
    return Flips(
        certified=int((firm & ~flipped).sum()),
        uncertain=int((~firm & ~flipped).sum()),
        explained=int((~firm & flipped).sum()),
        unexplained=int((firm & flipped).sum()),
        rate_bound=None if flipped.any() else rule_of_three(len(reference)),
    )


def per_sample(
    candidate: Mapping[str, Array], reference: Mapping[str, Array], scales: Mapping[str, float] | None = None
) -> tuple[Array, Array] | None:
    """Return max |candidate - reference| and the reference's margin of each sample (n,), both as a share of scale.

    None without a pair of outputs that holds one score per class.
    """
    name = labelled(reference)
    if name is None or name not in candidate or candidate[name].shape != reference[name].shape:
        return None
    scores = reference[name].astype(np.float64)
    errors = np.abs(candidate[name].astype(np.float64) - scores).max(axis=1)
    of = _scale_of(name, scores, scales)
    return errors / of, _margins(scores) / of


def _margins(scores: Array) -> Array:
    """Return the best score less the second best of each sample: (n, classes) to (n,)."""
    top = np.sort(scores, axis=1)[:, -2:]
    return np.asarray(top[:, 1] - top[:, 0])


def common_scales(references: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Return one scale per output over several batches: the largest |reference| of any.

    A batch of zeros, or with one pixel set, gives small outputs from large terms that cancel. As a share of these outputs
    alone, the error of correct float32 kernels comes within a factor of 2 of the bound.
    """
    largest: dict[str, float] = {}
    for reference in references:
        for name, values in reference.items():
            if values.size and np.isfinite(values).all():
                largest[name] = max(largest.get(name, 0.0), float(np.abs(values.astype(np.float64)).max()))
    return {name: value or 1.0 for name, value in largest.items()}


def rule_of_three(n: int) -> float:
    """Return the 95 % upper bound of a rate that n trials never showed: 3 / n (Hanley and Lippman-Hand, JAMA 1983)."""
    return min(1.0, 3.0 / n) if n else 1.0


def labelled(outputs: Mapping[str, Array]) -> str | None:
    """Return the name of the first output that holds one score per class."""
    return next((name for name, values in outputs.items() if has_labels(values)), None)


def has_labels(array: Array) -> bool:
    """Return whether an output holds one score per class: (n, classes) of floats, at least two classes."""
    return array.ndim == 2 and array.shape[1] >= 2 and np.issubdtype(array.dtype, np.floating)


def _scale_of(name: str, reference: Array, scales: Mapping[str, float] | None) -> float:
    return (scales or {}).get(name) or scale(reference)


def flipped_samples(
    candidate: Mapping[str, Array],
    reference: Mapping[str, Array],
    *,
    bound: float,
    labels: Array | None,
    scales: Mapping[str, float] | None = None,
) -> tuple[FlippedSample, ...]:
    """Return the samples whose top-1 label is not the reference's, in order; those that ``count_flips`` counts."""
    name, found = labelled(reference), per_sample(candidate, reference, scales)
    if name is None or found is None or not np.isfinite(candidate[name]).all():  # another check reports NaN
        return ()
    errors, margins = found
    before, after = reference[name].argmax(axis=1), candidate[name].argmax(axis=1)
    return tuple(
        FlippedSample(
            int(index),
            None if labels is None else int(labels[index]),
            int(before[index]),
            int(after[index]),
            float(margins[index]),
            float(errors[index]),
            explained=bool(margins[index] <= 2 * bound),
        )
        for index in np.flatnonzero(before != after)
    )


#: Significance level of a change of accuracy. One verification makes a handful of these tests.
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class AccuracyChange:
    """Labels that each side gets right, of n labelled samples."""

    n: int
    reference: int
    candidate: int
    lost: int  # Labels that only the reference gets right
    won: int  # Labels that only the candidate gets right
    #: Two-sided exact p-value of McNemar's test: the probability of a split at least as uneven as lost : won when
    #: either side is equally likely to be right
    p: float

    def sentence(self) -> str:
        """Return the change as a clause for the report."""
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
    """Return the two-sided exact p-value (McNemar, Psychometrika 12, 1947; binomial form): 1.0 where nothing changed."""
    n, fewer = lost + won, min(lost, won)
    # The terms are whole numbers of any size; only their ratio is a float.
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**n))
