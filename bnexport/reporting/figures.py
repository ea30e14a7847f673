"""Learning curves, confusion matrices, and functions that all figures share. The charts of a verification are in ``charts.py``.

Only matplotlib's object API is used: pyplot keeps global state and may look for a display. The colours are those of
Okabe and Ito (2008, "Color Universal Design"), and every curve also differs in its line style, so that no
picture depends on colour.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.errors import OutputError
from bnexport.files import write_atomically
from bnexport.plain_table import printable
from bnexport.tensors import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


#: File suffix -> metadata that is left out, because it would differ between two runs.
FORMATS: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}

#: key in a history row -> (legend, colour, line style); the three curves of the chapter.
CURVES: dict[str, tuple[str, str, str]] = {
    "train_loss": ("train loss", "#0072B2", "-"),
    "train_accuracy": ("train accuracy", "#D55E00", "--"),
    "test_accuracy": ("test accuracy", "#009E73", "-."),
}

#: Colour of all words in a figure.
INK = "#222222"


def learning_curves(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw train loss, train accuracy and test accuracy over the epochs, as the chapter does (d2l.ai, section 8.5).

    A row of ``history`` has ``epoch``, ``train_loss`` (nats), ``train_accuracy`` and ``test_accuracy`` (fractions); a value
    that is missing, None or not finite leaves a gap. The picture, .png or .svg, is written atomically. The title is taken
    literally.

    Raises:
        OutputError: ``path`` has another suffix or can't be written.
    """
    from matplotlib.ticker import MaxNLocator

    figure, ((axes,),) = new_panels(5.2, 3.4)
    epochs = [_number(row.get("epoch")) for row in history]
    for key, (label, colour, style) in CURVES.items():
        values = [_number(row.get(key)) for row in history]
        axes.plot(epochs, values, color=colour, linestyle=style, linewidth=1.8, marker="o", markersize=3, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (nats), accuracy (fraction)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    axes.legend(frameon=False, fontsize=9)
    write_atomically(path, render(figure, path), follow=True)


def new_panels(
    width: float, height: float, *, rows: int = 1, columns: int = 1, share: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of ``width`` x ``height`` inches with rows of panels; ``share``: one vertical axis per row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    grid: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False, sharey="row" if share else "none").tolist()
    for axes in (panel for row in grid for panel in row):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK)
        axes.xaxis.label.set(fontsize=9, color=INK)
        axes.yaxis.label.set(fontsize=9, color=INK)
    return figure, grid


def check_suffix(path: Path) -> None:
    """Refuse (OutputError) a picture that is neither .png nor .svg, before long work."""
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path} is neither a .png nor a .svg file", remedy="Choose one of these suffixes")


def render(figure: Figure, path: Path) -> bytes:
    """Return the figure's bytes as .png or .svg by the path's suffix, else OutputError; equal data give equal bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    check_suffix(path)
    suffix = path.suffix.lower()
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "bnexport"}):  # ids in an SVG are random without it
        figure.savefig(content, format=suffix[1:], dpi=160, metadata=FORMATS[suffix])
    return content.getvalue()


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


#: Largest number of classes for which every cell shows its count.
COUNTED = 20
#: Largest number of classes that are all named on the axes; of more, every second, fifth or tenth is named.
NAMED = 40
_LONGEST = 18  # letters of a class name


def confusion_picture(counts: Array, labels: Sequence[str], path: Path, *, title: str) -> None:
    """Draw each row of ``counts`` (true class, given class) as shares: the diagonal is recall, everything else a confusion.

    The colour follows the square root of the share, so that a confusion of 1 % is visible next to a diagonal of 90 %. The
    picture, .png or .svg, is written atomically. Labels and title are taken literally.

    Raises:
        OutputError: ``path`` has another suffix or can't be written.
    """
    from matplotlib.colors import PowerNorm

    check_suffix(path)
    n = len(labels)
    support = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(support, 1)
    side = 3.0 + 0.36 * min(n, COUNTED) + (2.0 if n > COUNTED else 0.0)
    figure, ((axes,),) = new_panels(side, side * 0.88)
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
    write_atomically(path, render(figure, path), follow=True)


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
        light = shares[row, column] > 0.3  # the colour is dark from the square root of 0.3 on
        colour = "white" if light else INK
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=6.5, color=colour)


def _short(label: str) -> str:
    plain = printable(label)
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 3].rstrip() + "..."
