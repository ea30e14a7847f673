"""The learning curves of a training run. The charts of a verification are in ``charts.py``.

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

from bnexport.errors import OutputError
from bnexport.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: File suffix -> metadata that would differ between two runs, switched off.
FORMATS: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}

#: key in a history row -> (legend, colour, line style); the three curves of the chapter.
CURVES: dict[str, tuple[str, str, str]] = {
    "train_loss": ("train loss", "#0072B2", "-"),
    "train_accuracy": ("train accuracy", "#D55E00", "--"),
    "test_accuracy": ("test accuracy", "#009E73", "-."),
}

_INK = "#222222"


def learning_curves(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw train loss, train accuracy and test accuracy over the epochs, as the chapter does (d2l.ai, section 8.5).

    Args:
        history: One row per epoch with ``epoch``, ``train_loss`` (nats), ``train_accuracy`` and ``test_accuracy``
            (fractions). A missing, None or non-finite value leaves a gap.
        path: The picture, .png or .svg; written atomically.
        title: Above the picture; taken literally.

    Raises:
        OutputError: ``path`` has another suffix or can't be written.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(5.2, 3.4)
    epochs = [_number(row.get("epoch")) for row in history]
    for key, (label, colour, style) in CURVES.items():
        values = [_number(row.get(key)) for row in history]
        axes.plot(epochs, values, color=colour, linestyle=style, linewidth=1.8, marker="o", markersize=3, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (nats), accuracy (fraction)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_title(title, fontsize=10, color=_INK, loc="left", parse_math=False)
    axes.legend(frameon=False, fontsize=9)
    write_atomically(path, _render(figure, path.suffix.lower(), where=path))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of ``width`` x ``height`` inches with one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes: Axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.xaxis.label.set(fontsize=9, color=_INK)
    axes.yaxis.label.set(fontsize=9, color=_INK)
    return figure, axes


def _render(figure: Figure, suffix: str, *, where: Path | None = None) -> bytes:
    """The figure's bytes, the same for the same data."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if suffix not in FORMATS:
        raise OutputError(f"{where} is neither a .png nor a .svg file", remedy="Choose one of these suffixes")
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "bnexport"}):  # ids in an SVG are random without it
        figure.savefig(content, format=suffix[1:], dpi=160, metadata=FORMATS[suffix])
    return content.getvalue()


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
