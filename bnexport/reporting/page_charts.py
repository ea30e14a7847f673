"""The charts of the page: which run has which, on axes that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from bnexport.reporting.charts import Axis, axis_of, drift, histogram, margins
from bnexport.reporting.runs import Run
from bnexport.reporting.summary import number
from bnexport.tensors import Array
from bnexport.verification.findings import LayerDrift
from bnexport.verification.verdict import VerificationReport

#: Run -> (error per sample, margin per sample), both (n,) and as shares of the reference's scale.
Samples = Mapping[str, tuple[Array, Array]]

#: Maps of error against margin that are shown at once; the others unfold on a click.
SHOWN_MAPS = 6
#: Runs whose layers are shown, those that left their prediction first.
SHOWN_DRIFTS = 6
#: Layers in a table, besides those that left their prediction.
SHOWN_LAYERS = 40


@dataclass(frozen=True)
class Strip:
    """The errors of one run.

    Attributes:
        name: Of the run.
        chart: Its distribution.
        error: The largest of all batches, as text.
    """

    name: str
    chart: Markup
    error: str


@dataclass(frozen=True)
class Strips:
    """The errors of every run on one axis."""

    lines: tuple[Strip, ...]
    axis: Axis


@dataclass(frozen=True)
class Drift:
    """The layers of one run.

    Attributes:
        name: Of the run.
        layers: All of them.
        shown: Those of the table: the first SHOWN_LAYERS, and all that left their prediction.
        first: Name of the first that left its prediction; "" where none did.
        chart: Measured beside predicted.
    """

    name: str
    layers: tuple[LayerDrift, ...]
    shown: tuple[LayerDrift, ...]
    first: str
    chart: Markup


def strips(lines: Sequence[Run], samples: Samples) -> Strips | None:
    """Distribution of the errors of each run that has some; None where none has."""
    measured = [run for run in lines if run.first is not None]
    if not measured:
        return None
    worst = {
        run.name: [row.error for row in run.kernels.rows if row.error is not None] for run in measured if run.kernels
    }
    bounds = {run.name: run.first.bound for run in measured if run.first}
    parts: list[Array | float | None] = [*bounds.values(), *(np.array(errors) for errors in worst.values())]
    parts += [samples[run.name][0] for run in measured if run.name in samples]
    axis = axis_of(parts)
    none = np.array([])
    return Strips(
        tuple(
            Strip(
                run.name,
                histogram(
                    samples[run.name][0] if run.name in samples else none, worst[run.name], bounds[run.name], axis
                ),
                number(max(worst[run.name])),
            )
            for run in measured
        ),
        axis,
    )


def maps(lines: Sequence[Run], samples: Samples) -> list[tuple[str, Markup]]:
    """(run, error against margin) of each run whose samples are known."""
    shown = [run for run in lines if run.name in samples and run.first is not None and len(samples[run.name][0])]
    across = axis_of(samples[run.name][1] for run in shown)
    bounds = {run.name: run.first.bound for run in shown if run.first}
    up = axis_of([*(samples[run.name][0] for run in shown), *bounds.values()])
    return [(run.name, margins(*samples[run.name], bounds[run.name], across, up)) for run in shown]


def drifts(report: VerificationReport) -> list[Drift]:
    """The layers of each run that was looked into, those that left their prediction first."""
    found = []
    for name, layers in report.findings.drift.items():
        if layers:
            left = next((layer.layer for layer in layers if layer.left), "")
            shown = tuple(layer for at, layer in enumerate(layers) if at < SHOWN_LAYERS or layer.left)
            found.append(Drift(name, tuple(layers), shown, left, drift(layers)))
    return sorted(found, key=lambda item: not item.first)
