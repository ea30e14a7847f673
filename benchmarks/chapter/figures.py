"""The figures of docs/results/chapter.md, one for each experiment.

Series differ in line style and marker as well as in colour (of Okabe and Ito), so they differ in black and white, too. Thin
lines and small marks are single seeds, thick ones means over the seeds that learned.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.chapter.claims import changes_of
from benchmarks.chapter.plan import BATCH_RATES, BATCHES, CONVENTION_BATCHES, RATES
from benchmarks.chapter.results import Results, Setting
from benchmarks.chapter.run import EpochResult
from bnexport.files import write_atomically
from bnexport.reporting.figures import INK, new_panels, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Series:
    """The drawing style of one series; ``label`` is its name in the legend."""

    label: str
    colour: str
    line: str
    mark: str

    def plot(self, axes: Axes, across: Iterable[float], up: Iterable[float], **style: Any) -> None:
        """Draw values in this style, apart from the given parts of it."""
        axes.plot(list(across), list(up), **{"color": self.colour, "linestyle": self.line, "marker": self.mark} | style)


_WITH = Series("with BatchNorm", "#0072B2", "-", "o")
_WITHOUT = Series("without", "#D55E00", "--", "s")
_MOVING = Series("moving statistics", "#D55E00", "--", "s")
_EXACT = Series("re-estimated statistics", "#0072B2", "-", "o")
_CONVENTIONS = {
    "torch": Series("torch.nn.BatchNorm", "#56B4E9", "-", ""),
    "scratch-unbiased": Series("from scratch, unbiased variance", "#D55E00", "--", "s"),
    "scratch": Series("from scratch, biased variance", "#222222", ":", "x"),
}
_LAYERS = ("bn1", "bn2", "bn3", "bn4")


def _rates(results: Results) -> Figure:
    """Experiment a: loss above, accuracy below, a column for each learning rate."""
    figure, grid = new_panels(9.0, 4.8, rows=2, columns=len(RATES), share=True)
    for setting in results.settings("a"):
        column, series = RATES.index(setting.spec.lr), _WITHOUT if setting.spec.norm == "none" else _WITH
        for row, of in enumerate(("train_loss", "test_accuracy")):
            _curves(grid[row][column], setting, series, of)
    _columns(grid, ("train loss (nats)", "test accuracy (fraction)"))
    return figure


def _conventions(results: Results) -> Figure:
    """Experiment b: curves on top of each other, and what the convention changes, seed by seed."""
    figure, ((curves, changes),) = new_panels(9.0, 3.4, rows=1, columns=2)
    by_place = {(setting.spec.batch_size, setting.spec.norm): setting for setting in results.settings("b")}
    for norm, series in _CONVENTIONS.items():
        for number, run in enumerate(by_place[CONVENTION_BATCHES[0], norm].runs):
            losses, width = _values(run.history, "train_loss"), 5.0 if norm == "torch" else 1.6
            label = series.label if number == 0 else None
            series.plot(curves, range(1, len(losses) + 1), losses, markersize=5, linewidth=width, label=label)
    curves.set_title(f"batches of {CONVENTION_BATCHES[0]}, a curve for each seed", fontsize=9, color=INK)
    _finish(curves, "epoch", "train loss (nats)")
    for place, size in enumerate(CONVENTION_BATCHES):
        found = changes_of(by_place[size, "scratch-unbiased"], by_place[size, "scratch"])
        _WITH.plot(changes, [place] * len(found), found, linestyle="", markersize=5)
    changes.axhline(0.0, color=INK, linewidth=0.8)
    changes.set_xlim(-0.5, len(CONVENTION_BATCHES) - 0.5)
    changes.set_xticks(range(len(CONVENTION_BATCHES)), [str(size) for size in CONVENTION_BATCHES])
    changes.set_title("unbiased less biased variance, a point for each seed", fontsize=9, color=INK)
    _finish(changes, "batch size (images)", "change of test accuracy (fraction)", legend=False)
    return figure


def _batches(results: Results) -> Figure:
    """Experiment c: accuracy over batch size, a panel for each learning rate."""
    figure, (row,) = new_panels(9.0, 3.4, rows=1, columns=len(BATCH_RATES), share=True)
    for axes, lr in zip(row, BATCH_RATES, strict=True):
        settings = [setting for setting in results.settings("c") if setting.spec.lr == lr]
        for series, of, aside in ((_MOVING, "test_accuracy", 0.96), (_EXACT, "exact_accuracy", 1.04)):
            places = [setting.spec.batch_size * aside for setting in settings]
            for place, setting in zip(places, settings, strict=True):
                for run in setting.runs:
                    values = _values(run.history[-1:], of)
                    face = series.colour if run.outcome == "learned" else "none"
                    series.plot(axes, [place] * len(values), values, linestyle="", markersize=4, markerfacecolor=face)
            means = [mean.mean if (mean := setting.mean(of)) is not None else math.nan for setting in settings]
            series.plot(axes, places, means, marker="", linewidth=1.8, label=series.label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(BATCHES, [str(size) for size in BATCHES])
        axes.set_title(f"learning rate {lr:g}", fontsize=9, color=INK)
        _finish(axes, "batch size (images)", "test accuracy (fraction)" if lr == BATCH_RATES[0] else "")
        axes.set_ylim(0, 1)
    return figure


def _statistics(results: Results) -> Figure:
    """Experiment d: accuracy with both statistics above, their distance below."""
    figure, grid = new_panels(9.0, 4.8, rows=2, columns=len(RATES), share=True)
    for setting in results.settings("d"):
        column = RATES.index(setting.spec.lr)
        _curves(grid[0][column], setting, _MOVING, "test_accuracy")
        _curves(grid[0][column], setting, _EXACT, "exact_accuracy")
        _curves(grid[1][column], setting, Series("distance", "#222222", "-", "o"), "shift")
    _columns(grid, ("test accuracy (fraction)", "shift of moving means\n(standard deviations)"))
    return figure


def _affine(results: Results) -> Figure:
    """Experiment e: a box for each layer and seed."""
    figure, (row,) = new_panels(9.0, 3.6, rows=1, columns=2)
    (setting,) = results.settings("e")
    runs, blue = [run for run in setting.runs if run.affine], {"color": _WITH.colour}
    for axes, name, start in zip(row, ("gamma", "beta"), (1.0, 0.0), strict=True):
        axes.axhline(start, color="#D55E00", linestyle="--", linewidth=1.2, label=f"before training ({start:g})")
        for number, layer in enumerate(_LAYERS):
            for seed, run in enumerate(runs):
                place = number + (seed + 1) / (len(runs) + 1) - 0.5
                axes.boxplot(
                    [run.affine[layer][name]], positions=[place], widths=0.7 / (len(runs) + 1), whis=(0, 100),
                    manage_ticks=False, boxprops=blue, whiskerprops=blue, capprops=blue,
                    medianprops={"color": "#222222", "linewidth": 1.6},
                )  # fmt: skip
        axes.set_xticks(range(len(_LAYERS)), _LAYERS)
        _finish(axes, "layer, a box for each seed", f"{name} (no unit)")
    return figure


#: Experiment -> (drawing, alternative text).
FIGURES: dict[str, tuple[Callable[[Results], Figure], str]] = {
    "a": (_rates, "Train loss and test accuracy per epoch with and without BatchNorm at each learning rate"),
    "b": (
        _conventions,
        "Train loss per epoch of torch's BatchNorm and of the one from scratch, and what the variance changes",
    ),
    "c": (_batches, "Test accuracy over batch size with moving and with re-estimated statistics"),
    "d": (_statistics, "Test accuracy per epoch with moving and with re-estimated statistics, and their distance"),
    "e": (_affine, "Gamma and beta of each layer after training, a box for each seed"),
}


def write_figures(results: Results, folder: Path) -> None:
    """Write ``<experiment>.svg`` for each complete experiment; equal results give equal bytes."""
    for experiment in results.experiments:
        path = folder / f"{experiment}.svg"
        write_atomically(path, render(FIGURES[experiment][0](results), path))


def _values(epochs: Iterable[EpochResult], of: str) -> list[float]:
    return [value for epoch in epochs if (value := getattr(epoch, of)) is not None]


def _curves(axes: Axes, setting: Setting, series: Series, of: str) -> None:
    """Draw thin lines for the seeds, a cross where one diverged, and a thick line for the mean of those that learned."""
    for run in setting.runs:
        values = _values(run.history, of)
        series.plot(axes, range(1, len(values) + 1), values, marker="", linewidth=0.6, alpha=0.7)
        if run.diverged is not None:
            above = axes.get_xaxis_transform()  # a diverged run has no value: the cross is at the upper edge
            series.plot(axes, [run.diverged], [0.96], marker="X", linestyle="", transform=above)
    columns = zip(*(run.history for run in setting.learned), strict=True)
    means = [statistics.mean(_values(column, of)) for column in columns]
    series.plot(axes, range(1, len(means) + 1), means, linewidth=1.8, markersize=4, label=series.label)


def _columns(grid: list[list[Axes]], heads: tuple[str, str]) -> None:
    """Titles, axis titles and legends of two rows of panels, a column for each learning rate."""
    for row, head in zip(grid, heads, strict=True):
        for number, (axes, lr) in enumerate(zip(row, RATES, strict=True)):
            _finish(axes, "epoch", head if number == 0 else "", legend=number == 0 and row is grid[0])
            if row is grid[0]:
                axes.set_title(f"learning rate {lr:g}", fontsize=9, color=INK)


def _finish(axes: Axes, across: str, up: str, *, legend: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_ylim(bottom=0) if axes.get_ylim()[0] >= 0 else None
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if across == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if legend:
        axes.legend(frameon=False, fontsize=8, handlelength=3.2)
