"""Measuring: numbers only, no verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bnexport.runtimes.replay import incomparable, scale
from bnexport.tensors import Array
from bnexport.verification.verdict import Flips


@dataclass(frozen=True)
class Measurement:
    """How far a candidate is from its reference.

    Attributes:
        error: max |candidate - reference| / scale, the scale being max |reference|; the worst output's. Where a
            reference is all zeros its scale counts as 1, so the error is absolute.
        max_abs: max |candidate - reference|.
        rms: Root mean square of candidate - reference, over the worst output.
        n: Samples compared.
        problem: Why the numbers mean nothing: a missing output, another shape, nothing to compare, not finite; else "".
        flips: Top-1 labels of the first output that holds one score per class; None without one.
    """

    error: float = 0.0
    max_abs: float = 0.0
    rms: float = 0.0
    n: int = 0
    problem: str = ""
    flips: Flips | None = None


def measure(
    candidate: Mapping[str, Array],
    reference: Mapping[str, Array],
    *,
    bound: float,
    scales: Mapping[str, float] | None = None,
) -> Measurement:
    """Compare every output of the reference.

    Args:
        candidate: Output name -> array (n, ...).
        reference: Output name -> array (n, ...), float64 where it is a real one.
        bound: Allowed error of scale; the margin certificate of the labels rests on it.
        scales: Output name -> scale; default: that of these very references.
    """
    if not reference:
        return Measurement(problem="there is no output to compare")
    parts = []
    for name, expected in reference.items():
        if name not in candidate:
            return Measurement(problem=f"output {name!r} is missing")
        if (problem := incomparable(name, candidate[name], expected)) is not None:
            return Measurement(n=len(expected) if expected.ndim else 0, problem=problem)
        parts.append(_distance(candidate[name], expected, _scale_of(name, expected, scales)))
    worst = max(parts, key=lambda part: part.error)
    flips = next(
        (
            count_flips(candidate[name], values, bound=bound, of=_scale_of(name, values, scales))
            for name, values in reference.items()
            if has_labels(values)
        ),
        None,
    )
    return Measurement(worst.error, max(part.max_abs for part in parts), worst.rms, worst.n, "", flips)


def count_flips(candidate: Array, reference: Array, *, bound: float, of: float | None = None) -> Flips:
    """Compare top-1 labels, with the margin certificate.

    No score may be off by more than ``bound`` times the scale. Where the reference's best score leads by more than
    twice that, the label can't change: one score would have to fall and another rise by the allowed error each.

    Args:
        candidate: (n, classes).
        reference: (n, classes), finite.
        bound: Allowed error of scale.
        of: The scale; default: that of ``reference``.
    """
    allowed = bound * (scale(reference) if of is None else of)
    top = np.sort(reference, axis=1)[:, -2:]
    firm = (top[:, 1] - top[:, 0]) > 2 * allowed
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
    """Error and margin of each sample, for the plots; None without an output that holds one score per class.

    Returns:
        max |candidate - reference| (n,), and the reference's best score less its second best (n,), both as a share of
        the reference's scale.
    """
    name = next((name for name, values in reference.items() if has_labels(values)), None)
    if name is None or candidate[name].shape != reference[name].shape:
        return None
    scores = reference[name].astype(np.float64)
    top = np.sort(scores, axis=1)[:, -2:]
    errors = np.abs(candidate[name].astype(np.float64) - scores).max(axis=1)
    of = _scale_of(name, scores, scales)
    return errors / of, (top[:, 1] - top[:, 0]) / of


def common_scales(references: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """One scale per output over several batches: the largest |reference| of any.

    A batch of zeros, or of one lit pixel, gives small answers by large terms that cancel; measured against those answers
    alone, correct float32 kernels come within a factor of 2 of the bound.
    """
    largest: dict[str, float] = {}
    for reference in references:
        for name, values in reference.items():
            if values.size and np.isfinite(values).all():
                largest[name] = max(largest.get(name, 0.0), float(np.abs(values.astype(np.float64)).max()))
    return {name: value or 1.0 for name, value in largest.items()}


def rule_of_three(n: int) -> float:
    """95 % upper bound of a rate of which n trials showed nothing: 3 / n (Hanley and Lippman-Hand, JAMA 1983)."""
    return min(1.0, 3.0 / n) if n else 1.0


def has_labels(array: Array) -> bool:
    """Whether an output holds one score per class: (n, classes) of floats, at least two classes."""
    return array.ndim == 2 and array.shape[1] >= 2 and np.issubdtype(array.dtype, np.floating)


def _scale_of(name: str, reference: Array, scales: Mapping[str, float] | None) -> float:
    return (scales or {}).get(name) or scale(reference)


def _distance(candidate: Array, reference: Array, of: float) -> Measurement:
    difference = candidate.astype(np.float64) - reference.astype(np.float64)
    max_abs = float(np.abs(difference).max())
    rms = float(np.sqrt(np.mean(np.square(difference))))
    return Measurement(max_abs / of, max_abs, rms, len(reference))
