"""Samples whose label changed, gathered over the runs, with their pictures, for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnexport.tensors import Array
from bnexport.verification.verdict import FlippedSample, VerificationReport

#: Changed samples that the page shows, those that nothing explains first.
SHOWN_FLIPS = 24
#: Pairs of classes that the page lists, the most frequent first.
SHOWN_CONFUSIONS = 12
_SIZE = 56  # pixels on the page; twice as many in the file, for sharp screens
_COLOURS = 64


@dataclass(frozen=True)
class Flip:
    """One sample that got the same other class on one or more runs.

    Attributes:
        sample: As the run saw it on which it is hardest to explain.
        runs: Where it happened: "runtime" or "runtime, settings".
    """

    sample: FlippedSample
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Confusion:
    """How many samples went from one class to another.

    Attributes:
        reference: The reference's class.
        candidate: The class that they got.
        samples: Different samples.
        unexplained: Of these, samples whose margin does not explain it on some run.
        runs: On how many runs.
    """

    reference: int
    candidate: int
    samples: int
    unexplained: int
    runs: int


def flips(report: VerificationReport) -> list[Flip]:
    """Changed samples: what nothing explains first, then the largest margin."""
    gathered: dict[tuple[int, int, int], list[tuple[str, FlippedSample]]] = {}
    for name, items in report.findings.flipped.items():
        for item in items:
            gathered.setdefault((item.index, item.reference, item.candidate), []).append((name, item))
    found = [
        Flip(min((item for _, item in cases), key=_rank), tuple(name for name, _ in cases))
        for cases in gathered.values()
    ]
    return sorted(found, key=lambda flip: _rank(flip.sample))


def pictures(report: VerificationReport, shown: Sequence[Flip]) -> dict[int, str]:
    """Index -> data URI of the input of each sample that has a picture."""
    indices = {flip.sample.index for flip in shown} & set(report.pictures)
    return {index: uri for index in sorted(indices) if (uri := picture(report.pictures[index]))}


def confusions(report: VerificationReport) -> list[Confusion]:
    """Pairs of classes, the most frequent first."""
    gathered: dict[tuple[int, int], list[tuple[str, FlippedSample]]] = {}
    for name, items in report.findings.flipped.items():
        for item in items:
            gathered.setdefault((item.reference, item.candidate), []).append((name, item))
    found = [
        Confusion(
            *pair,
            samples=len({item.index for _, item in cases}),
            unexplained=len({item.index for _, item in cases if not item.explained}),
            runs=len({name for name, _ in cases}),
        )
        for pair, cases in gathered.items()
    ]
    return sorted(found, key=lambda row: (-row.samples, row.reference, row.candidate))


def class_name(index: int | None, labels: Sequence[str] | None) -> str:
    """A class as its label, its number where there are none, "-" for None."""
    if index is None:
        return "-"
    return labels[index] if labels is not None and 0 <= index < len(labels) else str(index)


def picture(array: Array) -> str:
    """An input (channels, height, width) as a small PNG in a data URI, its values stretched to black and white; "" for none.

    Three channels are shown in colour, of any other number the first.
    """
    from PIL import Image

    if array.ndim != 3 or not array.size or not np.isfinite(array).all():
        return ""
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    grey = ((values - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)
    image = Image.fromarray(np.moveaxis(grey, 0, -1) if len(grey) == 3 else grey[0])
    if max(image.size) > 2 * _SIZE:
        image.thumbnail((2 * _SIZE, 2 * _SIZE))
        image = (
            image.quantize(_COLOURS) if image.mode == "RGB" else image
        )  # photographs take 5 times the room otherwise
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _rank(item: FlippedSample) -> tuple[bool, float, int]:
    """Unexplained before explained, then by margin: the larger it is, the less the change was to be expected."""
    return (item.explained, -item.margin, item.index)
