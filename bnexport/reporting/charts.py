"""Charts as inline SVG: a few kB each, sharp at any size, in the page's own colours by day, in the dark and on paper.

A chart holds numbers and fixed words only. Names come from untrusted files, so they are next to the chart, as HTML. The chart
of speeds is also a file without a page: it holds its names, escaped, and its style.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from markupsafe import Markup, escape

from bnexport.reporting.summary import ReportedRun
from bnexport.tensors import Array
from bnexport.verification.verdict import Int8Range, LayerDrift, VerificationReport, number

#: Ends of logarithmic axes. Smaller values (an exact 0) and larger ones (infinity) are drawn at the end.
LEAST, MOST = 1e-10, 1e3
_BINS = 96
_COLUMNS, _ROWS = 64, 44
_LEVELS = 4
_DOTTED = 40  # largest number of layers that are drawn with a dot each


@dataclass(frozen=True)
class ChartAxis:
    """A logarithmic axis of whole decades."""

    low: int  # Exponent of 10 at its beginning
    high: int  # Exponent at its end; larger than ``low``

    def at(self, values: Array | float) -> Array:
        """Return the places of values on the axis, from 0 to 1. NaN stays NaN."""
        drawn = np.clip(np.asarray(values, dtype=np.float64), 10.0**self.low, 10.0**self.high)
        return (np.log10(drawn) - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Return (place from 0 to 1, label) of at most ``most`` whole decades, with both ends if the step allows it."""
        step = max(1, math.ceil((self.high - self.low) / (most - 1)))
        return [
            ((at - self.low) / (self.high - self.low), number(10.0**at)) for at in range(self.low, self.high + 1, step)
        ]


def axis_of(parts: Iterable[Array | float | None]) -> ChartAxis:
    """Return the axis that holds every finite number; 1e-9 to 1 without finite numbers."""
    numbers = [np.asarray(part, dtype=np.float64).ravel() for part in parts if part is not None]
    joined = np.concatenate(numbers) if numbers else np.array([])
    finite = np.clip(joined[np.isfinite(joined)], LEAST, MOST)
    if finite.size == 0:
        return ChartAxis(-9, 0)
    low = math.floor(math.log10(float(finite.min())) + 1e-9)
    return ChartAxis(low, max(low + 1, math.ceil(math.log10(float(finite.max())) - 1e-9)))


def histogram(errors: Array, worst: Sequence[float], bound: float | None, axis: ChartAxis) -> Markup:
    """Draw one run's errors as a strip: an area for the samples, a dot for each batch's largest error (``worst``), the bound.

    ``errors`` (n,) are shares of the scale and may be empty. Every run of a page shares the axis. The height grows with the
    logarithm of the count, so that one bad sample of thousands can be seen.
    """
    finite = np.asarray(errors, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    parts = [f'<path class="grid" d="M{_n(1000 * share)} 0V24"/>' for share, _ in axis.ticks()]
    if finite.size:
        counts, edges = np.histogram(axis.at(finite), bins=_BINS, range=(0.0, 1.0))
        heights = 22 * np.log1p(counts) / np.log1p(counts.max())
        steps = "".join(
            f"V{_n(24 - height)}H{_n(1000 * right)}" for height, right in zip(heights, edges[1:], strict=True)
        )
        parts.append(f'<path class="area" d="M0 24{steps}V24Z"/>')
    places = axis.at(np.array([error for error in worst if math.isfinite(error)]))
    parts += [f'<path class="dot" d="M{_n(1000 * place)} 12v.01"/>' for place in places]
    if bound is not None and math.isfinite(bound):
        parts.append(f'<path class="bound" d="M{_n(1000 * float(axis.at(bound)))} 0V24"/>')
    return _svg("strip", 1000, 24, "errors of the samples on a logarithmic axis", "".join(parts), stretch=True)


def margins(errors: Array, margin: Array, bound: float | None, across: ChartAxis, up: ChartAxis) -> Markup:
    """Draw error against margin of one run's samples (n,) as a map of counts; labels can change in the shaded corner only.

    Both are shares of the scale. The margin is the reference's best score less its second best. While it exceeds twice the
    error, no error of that size can change the label.
    """
    left, width, height = 46, 256, 150
    known = np.isfinite(errors) & np.isfinite(margin)
    counts, _, _ = np.histogram2d(
        across.at(np.asarray(margin)[known]),
        up.at(np.asarray(errors)[known]),
        bins=(_COLUMNS, _ROWS),
        range=((0.0, 1.0), (0.0, 1.0)),
    )
    # The corner where the error is at least half of the margin
    edges = np.log10(np.logspace(across.low, across.high, 2) / 2)
    start, end = (_n(y) for y in height * (1 - (edges - up.low) / (up.high - up.low)))
    corner = f"M{left} {start}L{left + width} {end}L{left + width} {-height}L{left} {-height}Z"
    parts = [f'<path class="risk" d="{corner}"/>', *_lines_across(up, left, width, height)]
    for share, label in across.ticks(4):
        x = _n(left + width * share)
        anchor = "start" if share < 0.03 else "end" if share > 0.97 else "middle"
        parts.append(f'<text x="{x}" y="{height + 13}" style="text-anchor:{anchor}">{label}</text>')
    if counts.size and counts.max() > 0:
        levels = np.ceil(_LEVELS * np.log1p(counts) / np.log1p(counts.max())).astype(int)
        for level in range(1, _LEVELS + 1):
            cells = "".join(
                f"M{_n(left + width * column / _COLUMNS)} {_n(height - height * row / _ROWS)}h{_n(width / _COLUMNS)}"
                f"v-{_n(height / _ROWS)}h-{_n(width / _COLUMNS)}z"
                for column, row in zip(*np.nonzero(levels == level), strict=True)
            )
            if cells:
                parts.append(f'<path class="level{level}" d="{cells}"/>')
    if bound is not None and math.isfinite(bound):
        parts.append(f'<path class="bound" d="M{left} {_n(height * (1 - float(up.at(bound))))}h{width}"/>')
    return _svg("map", left + width + 12, height + 18, "error against margin of each sample", "".join(parts))


def drift(layers: Sequence[LayerDrift]) -> Markup:
    """Draw measured and predicted error by layer, in the order of computation; crosses mark errors above the prediction."""
    left, width, height = 46, 256, 120
    measured = np.array([layer.error for layer in layers], dtype=np.float64)
    predicted = np.array([layer.predicted for layer in layers], dtype=np.float64)
    up = axis_of([measured, predicted])
    xs = left + width * (np.arange(len(layers)) + 0.5) / max(1, len(layers))
    ys, expected = height * (1 - up.at(measured)), height * (1 - up.at(predicted))
    parts = list(_lines_across(up, left, width, height))
    parts.append(f'<path class="expected" d="{_line(xs, expected)}"/><path class="line" d="{_line(xs, ys)}"/>')
    for x, y, layer in zip(xs, ys, layers, strict=True):
        if layer.left:
            parts.append(f'<path class="left" d="M{_n(x - 3)} {_n(y - 3)}l6 6m0-6l-6 6"/>')
        elif len(layers) <= _DOTTED:
            parts.append(f'<path class="dot" d="M{_n(x)} {_n(y)}v.01"/>')
    parts.append(f'<text class="x" x="{left}" y="{height + 13}" style="text-anchor:start">first layer</text>')
    parts.append(f'<text class="x" x="{left + width}" y="{height + 13}" style="text-anchor:end">last layer</text>')
    return _svg("drift", left + width + 12, height + 18, "error of each layer and its prediction", "".join(parts))


def bar(share: float, most: float) -> Markup:
    """Draw a share as a bar; the strip ends at ``most``."""
    grid = "".join(f'<path class="grid" d="M{at} 0V24"/>' for at in (0, 250, 500, 750, 1000))
    width = _n(1000 * min(share / most, 1.0)) if most > 0 else "0"
    return _svg(
        "strip", 1000, 24, "share of the noise", f'{grid}<path class="area" d="M0 3H{width}V21H0Z"/>', stretch=True
    )


def int8_range(item: Int8Range) -> Markup:
    """Draw a range on its own linear axis: an area as stored, lines at the ends as trained, a bar of dots as seen."""
    parts = [pair for pair in ((item.low, item.high), item.trained, item.seen) if pair is not None]
    low, high = min(0.0, *(pair[0] for pair in parts)), max(0.0, *(pair[1] for pair in parts))
    width = (high - low) or 1.0

    def at(value: float) -> str:
        return _n(10 + 980 * (value - low) / width)

    drawn = f'<path class="grid" d="M{at(0.0)} 0V24"/>'
    drawn += f'<path class="area" d="M{at(item.low)} 5H{at(item.high)}V19H{at(item.low)}Z"/>'
    if item.seen is not None:
        drawn += f'<path class="line" d="M{at(item.seen[0])} 12H{at(item.seen[1])}"/>'
    if item.trained is not None:
        drawn += "".join(f'<path class="bound" d="M{at(end)} 1V23"/>' for end in item.trained)
    return _svg("strip", 1000, 24, "range as stored, trained and seen", drawn, stretch=True)


@dataclass(frozen=True)
class SpeedCurve:
    """The batch sizes of one file, runtime, number of threads and number of sessions."""

    name: str  # Its line in the legend
    colour: int  # Curves of one file and runtime have one colour
    dash: int  # Curves of one number of threads and sessions have one pattern
    points: tuple[tuple[float, float], ...]  # (latency of a call in ms, images per second)


#: Number of colours in speeds.css, by day and in the dark, after Okabe and Ito (2008), and of patterns of lines.
_COLOURS, _DASHES = 6, 4
_LONGEST_NAME = 60


def speeds(curves: Sequence[SpeedCurve]) -> Markup:
    """Draw throughput against latency, both on logarithmic axes, one curve per variant, with its legend and its style."""
    left, width, height = 46, 330, 220
    across = _decades([point[0] for curve in curves for point in curve.points])
    up = _decades([point[1] for curve in curves for point in curve.points])
    style = resources.files("bnexport.reporting").joinpath("templates", "speeds.css").read_text(encoding="utf-8")
    parts = [f"<style>{''.join(style.splitlines())}</style>"]
    for share, label in _decade_ticks(up):
        y = _n(height * (1 - share))
        parts.append(f'<path class="g" d="M{left} {y}h{width}"/><text x="{left - 4}" y="{y}" dy="3.5">{label}</text>')
    for share, label in _decade_ticks(across):
        x = _n(left + width * share)
        parts.append(f'<path class="g" d="M{x} 0v{height}"/><text class="m" x="{x}" y="{height + 13}">{label}</text>')
    parts.append(f'<text class="m" x="{left + width / 2}" y="{height + 28}">median time of a call, ms</text>')
    parts.append('<text class="s" x="0" y="-14">images per second</text>')
    for place, curve in enumerate(curves):
        xs = left + width * across.at(np.array([x for x, _ in curve.points]))
        ys = height * (1 - up.at(np.array([y for _, y in curve.points])))
        look = f"c{curve.colour % _COLOURS} d{curve.dash % _DASHES}"
        parts.append(f'<path class="{look}" d="{_line(xs, ys)}"/>')
        parts += [f'<path class="{look} p" d="M{_n(x)} {_n(y)}v.01"/>' for x, y in zip(xs, ys, strict=True)]
        line = height + 46 + 14 * place
        name = curve.name if len(curve.name) <= _LONGEST_NAME else f"{curve.name[: _LONGEST_NAME - 3]}..."
        parts.append(
            f'<path class="{look}" d="M0 {line}h30"/><text class="s" x="38" y="{line}" dy="3.5">{escape(name)}</text>'
        )
    whole = height + 46 + 14 * len(curves)
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="speeds" viewBox="-8 -26 {left + width + 34} {whole + 26}" role="img" '
        f'aria-label="throughput against latency">{"".join(parts)}</svg>'
    )  # numbers, fixed words and escaped names


def _decades(values: Sequence[float]) -> ChartAxis:
    """Return the axis of whole decades that holds positive numbers; 1 to 10 without any."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    low = math.floor(min(logs) + 1e-9)
    return ChartAxis(low, max(low + 1, math.ceil(max(logs) - 1e-9)))


def _decade_ticks(axis: ChartAxis) -> list[tuple[float, str]]:
    """Return (place from 0 to 1, label) of every decade: "0.01", "100", "10k"."""
    width = axis.high - axis.low
    labels = [
        f"{10.0**at:g}" if at < 3 else f"{10 ** (at % 3)}{'kMGTPE'[at // 3 - 1]}"
        for at in range(axis.low, axis.high + 1)
    ]
    return [(place / width, label) for place, label in enumerate(labels)]


def _lines_across(up: ChartAxis, left: int, width: int, height: int) -> Iterator[str]:
    """Yield the labelled lines of an axis that goes upwards."""
    for share, label in up.ticks(4):
        y = _n(height * (1 - share))
        yield f'<path class="grid" d="M{left} {y}h{width}"/><text x="{left - 4}" y="{y}" dy="3.5">{label}</text>'


def _line(xs: Array, ys: Array) -> str:
    points = [f"{_n(x)} {_n(y)}" for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    return "M" + "L".join(points) if points else "M0 0"


def _n(value: float) -> str:
    return f"{float(value):.1f}".removesuffix(".0")


def _svg(kind: str, width: int, height: int, name: str, content: str, *, stretch: bool = False) -> Markup:
    ratio = ' preserveAspectRatio="none"' if stretch else ""
    top = 0 if stretch else -8  # half of the uppermost label
    text = f'<svg class="{kind}" viewBox="0 {top} {width} {height - top}"{ratio} role="img" aria-label="{name}">{content}</svg>'
    return Markup(text)  # numbers and the fixed words of this file: nothing to escape


#: Run -> (error per sample, margin per sample), both (n,) and as shares of the reference's scale.
Samples = Mapping[str, tuple[Array, Array]]

#: Number of maps that are shown at once; the others unfold on a click.
SHOWN_MAPS = 6
#: Number of runs whose layers are shown, those above their prediction first.
SHOWN_DRIFTS = 6
#: Number of layers and ranges of an int8 file that are shown at once.
SHOWN_INT8 = 16
#: Number of layers in a table, in addition to those above their prediction.
SHOWN_LAYERS = 40


@dataclass(frozen=True)
class Strips:
    """The errors of every run on one axis."""

    #: Name of each run, distribution of its errors, and the largest error of all batches, as text
    lines: tuple[tuple[str, Markup, str], ...]
    axis: ChartAxis


@dataclass(frozen=True)
class Drift:
    """The layers of one run."""

    name: str  # Name of the run
    layers: tuple[LayerDrift, ...]
    shown: tuple[LayerDrift, ...]  # Layers of the table: the first SHOWN_LAYERS, and all above their prediction
    first: str  # Name of the first layer above its prediction, or ""
    chart: Markup  # Measured and predicted errors


def strips(lines: Sequence[ReportedRun], samples: Samples) -> Strips | None:
    """Return the distribution of the errors of each run that has some; None if none has."""
    measured = [
        (run.name, run.first.bound, [row.error for row in run.kernels.rows if row.error is not None])
        for run in lines
        if run.kernels and run.first
    ]
    if not measured:
        return None
    errors = {name: samples[name][0] if name in samples else np.array([]) for name, _, _ in measured}
    axis = axis_of(part for name, bound, worst in measured for part in (bound, np.array(worst), errors[name]))
    drawn = ((name, histogram(errors[name], worst, bound, axis), number(max(worst))) for name, bound, worst in measured)
    return Strips(tuple(drawn), axis)


def maps(lines: Sequence[ReportedRun], samples: Samples) -> list[tuple[str, Markup]]:
    """Return (run, error against margin) of each run whose samples are known."""
    shown = [run for run in lines if run.name in samples and len(samples[run.name][0])]
    bounds = {run.name: run.first.bound for run in shown if run.first}
    across = axis_of(samples[name][1] for name in bounds)
    corner = 10.0 ** (across.low + 1)  # Keeps the shaded corner in the picture.
    up = axis_of([*(samples[name][0] for name in bounds), *bounds.values(), corner])
    return [(name, margins(*samples[name], bound, across, up)) for name, bound in bounds.items()]


def drifts(report: VerificationReport) -> list[Drift]:
    """Return the layers of each run whose layers were compared, those above their prediction first."""
    found = []
    for name, layers in report.findings.drift.items():
        if layers:
            left = next((layer.layer for layer in layers if layer.left), "")
            shown = tuple(layer for at, layer in enumerate(layers) if at < SHOWN_LAYERS or layer.left)
            found.append(Drift(name, tuple(layers), shown, left, drift(layers)))
    return sorted(found, key=lambda item: not item.first)
