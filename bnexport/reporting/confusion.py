"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnexport.files import write_atomically
from bnexport.reporting.figures import INK, check_suffix, new_figure, render
from bnexport.tensors import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Classes up to which every cell shows its count.
COUNTED = 20
#: Classes up to which every class has its name on the axes; of more, every second, fifth or tenth has.
NAMED = 40
_LONGEST = 18  # letters of a class name


def confusion_picture(counts: Array, labels: Sequence[str], path: Path, *, title: str) -> None:
    """Draw each row as shares of its true class: the diagonal is recall, everything else a confusion.

    The colour follows the square root of the share, so that a confusion of 1 % still shows beside a diagonal of 90 %.

    Args:
        counts: Integers (classes, classes): row the true class, column the given one.
        labels: Class names; taken literally.
        path: The picture, .png or .svg; written atomically.
        title: Above the picture; taken literally.

    Raises:
        OutputError: ``path`` has another suffix or can't be written.
    """
    from matplotlib.colors import PowerNorm

    check_suffix(path)
    n = len(labels)
    support = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(support, 1)
    side = 3.0 + 0.36 * min(n, COUNTED) + (2.0 if n > COUNTED else 0.0)
    figure, axes = new_figure(side, side * 0.88)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0.0, vmax=1.0), interpolation="nearest")
    axes.set_xlabel("given class")
    axes.set_ylabel("true class")
    _name_classes(axes, labels)
    if n <= COUNTED:
        _write_counts(axes, counts, shares)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.set_label("share of the true class", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    write_atomically(path, render(figure, path))


def _name_classes(axes: Axes, labels: Sequence[str]) -> None:
    n = len(labels)
    step = 1 if n <= NAMED else next(step for step in (2, 5, 10, 20, 50, 100, n) if n / step <= NAMED)
    places = range(0, n, step)
    names = [_short(labels[place]) for place in places]
    size = 8 if n <= COUNTED else 6
    axes.set_xticks(list(places), names, rotation=90, fontsize=size)
    axes.set_yticks(list(places), names, fontsize=size)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)


def _write_counts(axes: Axes, counts: Array, shares: Array) -> None:
    for row, column in np.argwhere(counts > 0):
        light = shares[row, column] > 0.3  # the square root of it is where the colour turns dark
        colour = "white" if light else INK
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=6.5, color=colour)


def _short(label: str) -> str:
    plain = "".join(char if char.isprintable() else "?" for char in label)
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 3].rstrip() + "..."
