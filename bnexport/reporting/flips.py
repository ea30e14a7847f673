"""Samples whose label changed, with their pictures, for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

from bnexport.tensors import Array
from bnexport.verification.findings import FlippedSample
from bnexport.verification.verdict import VerificationReport

#: Changed labels that the page shows, those that nothing explains first.
SHOWN_FLIPS = 24
_SIZE = 56  # pixels


def flipped_rows(report: VerificationReport) -> list[tuple[str, FlippedSample, str]]:
    """(runtime, what changed, data URI of its picture or ""), what nothing explains first."""
    every = [(name, item) for name, items in report.findings.flipped.items() for item in items]
    every.sort(key=lambda pair: pair[1].explained)
    shown = {item.index for _, item in every[:SHOWN_FLIPS]}
    pictures = {index: picture(array) for index, array in report.pictures.items() if index in shown}
    return [(name, item, pictures.get(item.index, "")) for name, item in every]


def class_name(index: int | None, labels: Sequence[str] | None) -> str:
    """A class as its label, its number where there are none, "-" for None."""
    if index is None:
        return "-"
    return labels[index] if labels is not None and index < len(labels) else str(index)


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
    image.thumbnail((2 * _SIZE, 2 * _SIZE))
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")
