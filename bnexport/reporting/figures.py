"""Pictures: learning curves of a training run, errors of a verification.

Only matplotlib's object API is used: pyplot keeps global state and may look for a display. The colours are those of
Okabe and Ito (2008, "Color Universal Design"), and every series also differs in its line style or has its own panel,
so that no picture depends on colour.
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
from bnexport.tensors import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bnexport.reporting.summary import Group

#: Runtime name -> (error per sample, margin per sample), both (n,) and as fractions of the reference's largest |logit|.
Samples = Mapping[str, tuple[Array, Array]]

#: File suffix -> metadata that would differ between two runs, switched off.
FORMATS: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}

#: key in a history row -> (legend, colour, line style); the three curves of the chapter.
CURVES: dict[str, tuple[str, str, str]] = {
    "train_loss": ("train loss", "#0072B2", "-"),
    "train_accuracy": ("train accuracy", "#D55E00", "--"),
    "test_accuracy": ("test accuracy", "#009E73", "-."),
}

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_INK, _MUTED = "#222222", "#666666"
_LEAST, _MOST = 1e-10, 1e6  # logarithmic axes show what is smaller (an exact 0) or larger at these ends


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

    figure, (axes,) = _figure(5.2, 3.4, panels=1)
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


def error_overview(gathered: Sequence[Group]) -> bytes:
    """Draw every measured comparison of a verification as a dot, one line per stage and subject, with its bound.

    Args:
        gathered: From ``summary.groups``; groups without a finite error are left out.

    Returns:
        A PNG.
    """
    drawn = [group for group in gathered if any(_finite(row.error) for row in group.rows)]
    figure, (axes,) = _figure(4.6, 0.9 + 0.22 * max(2, len(drawn)), panels=1)
    for line, group in enumerate(drawn):
        rows = [row for row in group.rows if _finite(row.error)]
        for passed, marker, colour, alpha in ((True, "o", _PALETTE[0], 0.7), (False, "X", _PALETTE[1], 1.0)):
            errors = _drawable(np.array([row.error for row in rows if row.passed is passed], dtype=np.float64))
            axes.scatter(
                errors, np.full(errors.size, line), s=22, marker=marker, color=colour, alpha=alpha, linewidths=0
            )
        bounds = np.array(sorted({row.bound for row in rows if row.bound}))
        axes.scatter(bounds, np.full(bounds.size, line), s=90, marker="|", color=_INK)
    axes.set_xscale("log")
    axes.set_yticks(range(len(drawn)), [_short(f"{g.subject}, {g.stage}", 34) for g in drawn], parse_math=False)
    axes.set_ylim(max(1, len(drawn)) - 0.5, -0.5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("error / scale; | is the bound, x a failure")
    return _render(figure, ".png")


def error_histogram(samples: Samples, *, tolerance: float) -> bytes:
    """Draw how many samples have which error, one line per runtime, beside the tolerance.

    Args:
        samples: Error and margin of each sample by runtime.
        tolerance: The largest error that passes, as a fraction of the reference's largest |logit|.

    Returns:
        A PNG.
    """
    figure, (axes,) = _figure(4.6, 3.2, panels=1)
    errors = {name: _drawable(error) for name, (error, _) in samples.items()}
    edges = np.geomspace(*_limits([*errors.values(), np.array([tolerance])]), 61)
    for index, (name, error) in enumerate(errors.items()):
        counts, _ = np.histogram(error, bins=edges)
        axes.stairs(counts, edges, color=_colour(index), linestyle=_style(index), linewidth=1.5, label=_short(name))
    axes.axvline(tolerance, color=_INK, linewidth=1)
    axes.annotate("tolerance", (tolerance, 1), (-4, -4), ("data", "axes fraction"), "offset points", **_note("right"))
    axes.set_xscale("log")
    axes.set_xlabel("largest error of a sample / scale of the reference")
    axes.set_ylabel("samples")
    if samples:  # matplotlib warns about a legend without entries
        figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=min(3, len(samples)))
    return _render(figure, ".png")


def error_against_margin(samples: Samples, *, tolerance: float) -> bytes:
    """Draw each sample's error against its margin, one panel per runtime; no label can change below the grey region.

    The margin is the reference's largest logit less its second largest. While it exceeds twice the error, no error of
    that size can change the label; the grey region is where it could.

    Args:
        samples: Error and margin of each sample by runtime.
        tolerance: As for ``error_histogram``.

    Returns:
        A PNG.
    """
    columns = min(2, max(1, len(samples)))
    rows = max(1, math.ceil(len(samples) / columns))
    figure, panels = _figure(4.6, 0.7 + 1.9 * rows if rows > 1 else 3.2, panels=len(samples), columns=columns)
    low_x, high_x = _limits([_drawable(margin) for _, margin in samples.values()])
    low_y, high_y = _limits([*(_drawable(error) for error, _ in samples.values()), np.array([tolerance, low_x])])
    for index, (axes, (name, (error, margin))) in enumerate(zip(panels, samples.items(), strict=False)):
        edge = np.array([low_x, high_x])
        axes.fill_between(edge, edge / 2, max(high_y, high_x), color="#dddddd", linewidth=0)
        axes.scatter(_drawable(margin), _drawable(error), s=3, color=_colour(index), alpha=0.5, linewidths=0)
        axes.axhline(tolerance, color=_INK, linewidth=1)
        axes.set(xscale="log", yscale="log", xlim=(low_x, high_x), ylim=(low_y, high_y))
        axes.set_title(_short(name), fontsize=9, color=_INK, parse_math=False)
        axes.tick_params(labelbottom=index + columns >= len(samples))  # the lowest panel of each column
        if index == 0:
            axes.annotate(
                "tolerance", (1, tolerance), (-4, -4), ("axes fraction", "data"), "offset points", **_note("right")
            )
            axes.annotate("label could change", (0, 1), (3, -3), "axes fraction", "offset points", **_note("left"))
    figure.supxlabel("margin of a sample / scale", fontsize=9, color=_INK)
    figure.supylabel("largest error / scale", fontsize=9, color=_INK)
    return _render(figure, ".png")


def _figure(width: float, height: float, *, panels: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` x ``height`` inches with at least one panel; all panels share their axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    rows = max(1, math.ceil(panels / columns))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    every: list[Axes] = list(grid.flat)
    for axes in every[max(1, panels) :]:
        axes.set_visible(False)
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.xaxis.label.set(fontsize=9, color=_INK)
        axes.yaxis.label.set(fontsize=9, color=_INK)
    return figure, every[: max(1, panels)]


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


def _drawable(values: Array) -> Array:
    """Finite values as float64 (n,), moved to where a logarithmic axis can show them."""
    array = np.asarray(values, dtype=np.float64).ravel()
    return np.clip(np.where(np.isfinite(array), array, np.nan), _LEAST, _MOST)


def _limits(arrays: Sequence[Array]) -> tuple[float, float]:
    """Whole decades that hold every finite value."""
    joined = np.concatenate([np.ravel(array) for array in arrays]) if arrays else np.array([])
    finite = joined[np.isfinite(joined)]
    if finite.size == 0:
        return 1e-9, 1.0
    low, high = float(finite.min()), float(finite.max())
    return 10.0 ** math.floor(math.log10(low) - 1e-9), 10.0 ** math.ceil(math.log10(high) + 1e-9)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _colour(index: int) -> str:
    return _PALETTE[index % len(_PALETTE)]


def _style(index: int) -> Any:
    return _STYLES[index % len(_STYLES)]


def _note(side: str) -> dict[str, Any]:
    return {"ha": side, "va": "top", "fontsize": 8, "color": _MUTED}
