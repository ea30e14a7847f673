"""Which labels changed, sample by sample: what the report shows beside the counts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bnexport.runtimes.replay import scale
from bnexport.tensors import Array
from bnexport.verification.findings import FlippedSample
from bnexport.verification.metrics import has_labels


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
