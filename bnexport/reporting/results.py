"""Results of the commands on a terminal, or as JSON for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from bnexport.auditing.tool_table import AuditReport, AuditRow
from bnexport.bundle import REPORT, Bundle
from bnexport.environment import environment
from bnexport.evaluating.confusion import TOP_K, ClassScores, wilson_interval
from bnexport.folding.report import FoldReport
from bnexport.reporting.tables import (
    STYLES,
    literal,
    make_console,
    make_table,
    print_checks,
    print_environment,
    print_fold_report,
    print_verdict,
)
from bnexport.verification.verdict import NOTHING, VerificationReport, number

if TYPE_CHECKING:
    from bnexport.auditing.int8_audit import Int8Audit
    from bnexport.evaluating.evaluate import Evaluation
    from bnexport.evaluating.recalibration import Accuracy, Recalibration
    from bnexport.loading.inspection import Inspection
    from bnexport.nn.stale_statistics import StalenessReport
    from bnexport.nn.statistics import LayerStatistics
    from bnexport.serving.predictor import Prediction


#: Columns of the table of an int8 file.
_AUDIT_WIDTH = 80
#: Largest number of marked channels that are listed.
_LISTED = 8


@dataclass(frozen=True)
class ExportResult:
    """The result of a flow that writes a bundle."""

    bundle: Bundle | None  # None if the verdict is FAIL: nothing was written
    fold: FoldReport  # Outcome of each BatchNorm
    verification: VerificationReport


def print_export(
    fold: FoldReport,
    verification: VerificationReport,
    bundle: Bundle | None,
    *,
    as_json: bool = False,
    verbose: bool = False,
) -> None:
    """Print the verdict, the fold report, the checks and the bundle's path; after FAIL, that nothing was written."""
    if as_json:
        path = None if bundle is None else str(bundle.path)
        print_json({"bundle": path, "fold": fold.to_json(), "verification": verification.to_json()})
        return
    console = make_console()
    print_verdict(verification, console)
    print_fold_report(fold, console)
    labels = None if bundle is None else bundle.manifest.labels
    print_checks(verification, console, labels=labels, verbose=verbose)
    if bundle is None:
        console.print(literal("Nothing was written: a bundle appears only with the verdict PASS.", console))
        return
    size = sum(entry["size"] for entry in bundle.manifest.files.values())
    console.print(literal(f"Bundle: {bundle.path} ({size / 1000:.0f} kB)", console), soft_wrap=True)
    console.print(literal(f"Report: {bundle.path / REPORT}", console), soft_wrap=True)
    if bundle.manifest.takes_pixels:
        text = "Input: pixels as uint8, channels first. Every model file scales them and subtracts the mean itself."
        console.print(literal(text, console), soft_wrap=True)


def print_predictions(predictions: Sequence[Prediction], *, as_json: bool = False) -> None:
    """Print label and probability per image; the image's name is last, so that the columns stay aligned."""
    if as_json:
        for prediction in predictions:
            click.echo(json.dumps(prediction.to_json(), allow_nan=False))
        return
    console = make_console()
    table = make_table(console)
    table.add_column("label", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("image", overflow="fold")
    for prediction in predictions:
        table.add_row(
            literal(prediction.label, console), f"{prediction.probability:.4f}", literal(prediction.image, console)
        )
    console.print(table)


def print_statistics(
    inspection: Inspection, *, stale: StalenessReport | None = None, as_json: bool = False, every: bool = False
) -> None:
    """Print a summary, one row per BatchNorm, and the marked channels.

    Args:
        inspection: The content of the file.
        stale: The distance of its moving statistics from exact ones, if they were compared; printed after the table.
        as_json: Print JSON instead.
        every: Also print one row per channel.
    """
    if as_json:
        layers = [layer.to_json() for layer in inspection.layers]
        value: dict[str, Any] = {"file": str(inspection.file), "note": inspection.note, "layers": layers}
        print_json(value if stale is None else {**value, "staleness": stale.to_json()})
        return
    console = make_console()
    for line in _summary(inspection):
        console.print(literal(line, console))
    table = make_table(console)
    table.add_column("BatchNorm", overflow="fold")
    for heading in ("channels", "eps", "|gamma|", "moving var", "|scale|"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in inspection.layers:
        spans = (_span(abs(getattr(channel, name)) for channel in layer.channels) for name in _SPANS)
        table.add_row(literal(layer.name, console), str(len(layer.channels)), f"{layer.eps:g}", *spans)
    console.print(table)
    notes = ("ranges: smallest..largest over channels; scale = gamma / sqrt(moving var + eps)", inspection.note)
    for line in (*filter(None, map(_marks, inspection.layers)), *filter(None, notes)):
        console.print(literal(line, console))
    if stale is not None:
        print_staleness(stale, console)
        style = STYLES["FAIL"] if stale.stale else None
        console.print(literal(stale.sentence(), console, style=style), soft_wrap=True)
    for layer in inspection.layers if every else ():
        _print_channels(layer, console)
    if not every:
        console.print(literal("--all prints every channel.", console, style="dim"))


#: Columns of a layer that are shown as ranges.
_SPANS = ("gamma", "moving_var", "scale")


def _span(values: Iterable[float]) -> str:
    found = [value for value in values if math.isfinite(value)]
    return f"{min(found):.2g}..{max(found):.2g}" if found else NOTHING


def _print_channels(layer: LayerStatistics, console: Console) -> None:
    table = make_table(console)
    title = f"{layer.name} ({len(layer.channels)} channels, eps {layer.eps:g})"
    table.title, table.title_justify = literal(title, console), "left"
    table.add_column("channel", justify="right")
    for heading in ("gamma", "beta", "moving mean", "moving var", "scale"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for index, channel in enumerate(layer.channels):
        numbers = (channel.gamma, channel.beta, channel.moving_mean, channel.moving_var, channel.scale)
        table.add_row(str(index), *(f"{value:.4g}" for value in numbers), channel.mark)
    console.print(table)


def print_staleness(report: StalenessReport, console: Console) -> None:
    """Print the distance of each BatchNorm's moving statistics from the exact ones; the caller prints the sentence."""
    table = make_table(console)
    table.add_column("BatchNorm", overflow="fold")
    for heading in ("mean off", "at most", "scale off", "at most", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for layer in report.layers:
        table.add_row(
            literal(layer.name, console),
            f"{layer.shift:.3f}",
            f"{layer.worst_shift:.3f}",
            f"x {layer.scale:.3f}",
            f"x {layer.worst_scale:.3f}",
            f"{layer.error:.3f}",
            "stale" if report.is_stale(layer) else "",
        )
    console.print(table)
    notes = (
        "mean off: in standard deviations, root mean square over channels; scale off: a factor, either way",
        f"error: change of the layer's output, as a share of its variation; stale above {report.threshold:.2g}",
    )
    for note in notes:
        console.print(literal(note, console, style="dim"))


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON document on standard output."""
    click.echo(json.dumps(value, indent=1, allow_nan=False))


#: Mark of a channel -> its meaning, for the summary.
_MARKS = {
    "dead": "dead (constant output)",
    "exploding": "exploding (scale over 30 x the layer's median)",
    "not finite": "not finite",
}


def _summary(inspection: Inspection) -> tuple[str, str]:
    layers = inspection.layers
    channels = sum(len(layer.channels) for layer in layers)
    marks = [(sum(len(layer.marked(mark)) for layer in layers), text) for mark, text in _MARKS.items()]
    found = ", ".join(f"{count} {text}" for count, text in marks if count) or "none dead, exploding or not finite"
    return f"{len(layers)} BatchNorm layers with {channels} channels: {found}", f"in {inspection.file}"


def _marks(layer: LayerStatistics) -> str:
    """Return the marked channels of a layer: "bn2: 2 dead (channel 0, 3)"; "" for none."""
    parts = []
    for mark in _MARKS:
        if found := layer.marked(mark):
            shown = ", ".join(map(str, found[:_LISTED])) + (", ..." if len(found) > _LISTED else "")
            parts.append(f"{len(found)} {mark} (channel {shown})")
    return f"{layer.name}: {'; '.join(parts)}" if parts else ""


#: Largest number of printed classes; of more, those with the lowest F1 are printed.
LISTED_CLASSES = 20


def print_evaluation(evaluation: Evaluation, *, written: Sequence[str] = ()) -> None:
    """Print the table of classes, then accuracy with its interval, loss, top-k, and the ``written`` files."""
    console = make_console()
    _print_classes(evaluation.classes, console)
    what = f"{evaluation.n} test images of {evaluation.dataset}, {evaluation.runtime}"
    console.print(literal(f"{evaluation.subject}: {what}", console), soft_wrap=True)
    low, high = evaluation.interval
    lines = [
        f"accuracy {evaluation.accuracy:.4f} (95 % Wilson interval {low:.4f} to {high:.4f};"
        f" {evaluation.correct} of {evaluation.n})",
        f"loss {evaluation.loss:.4f} nats",
    ]
    if evaluation.top is not None:
        lines.append(f"top-{TOP_K} accuracy {evaluation.top:.4f}")
    if evaluation.note:
        lines.append(f"WARNING: {evaluation.note}")
    for line in (*lines, *(f"written: {path}" for path in written)):
        console.print(literal(line, console), soft_wrap=True)
    print_environment(evaluation.environment, console)


def _print_classes(classes: Sequence[ClassScores], console: Console) -> None:
    shown = list(classes)
    if len(shown) > LISTED_CLASSES:
        shown = sorted(shown, key=lambda row: (row.f1 is None, row.f1 or 0.0))[:LISTED_CLASSES]
    table = make_table(console)
    table.add_column("class", overflow="fold")
    for heading in ("precision", "recall", "F1", "support"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in shown:
        numbers = (_share(value) for value in (row.precision, row.recall, row.f1))
        table.add_row(literal(row.label, console), *numbers, str(row.support))
    console.print(table)
    if len(shown) < len(classes):
        note = f"the {len(shown)} of {len(classes)} classes with the lowest F1; --json FILE has all of them"
        console.print(literal(note, console, style="dim"))


def print_recalibration(done: Recalibration, *, as_json: bool = False) -> None:
    """Print the distance of the old statistics, the accuracy before and after, and the written file."""
    if as_json:
        print_json(done.to_json())
        return
    console = make_console()
    print_staleness(done.distance, console)
    facts = done.facts
    how = f"{facts['images']} training images of {facts['dataset']}, batches of {facts['batch_size']}"
    for line in (
        *done.notes,
        f"re-estimated over {how}; definition: {facts['definition']}",
        f"test accuracy before: {_accuracy(done.before)}",
        f"test accuracy after:  {_accuracy(done.after)}",
        f"written: {done.out}",
    ):
        console.print(literal(line, console), soft_wrap=True)
    print_environment(done.environment, console)


def _accuracy(found: Accuracy) -> str:
    low, high = wilson_interval(found.correct, found.n)
    return f"{found.correct / found.n:.4f} (95 % {low:.4f} to {high:.4f}, n = {found.n})"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


_STYLES = {"right": "green", "wrong": "bold red", "failed": "yellow", "not run": "dim"}


def print_audit(report: AuditReport, *, as_json: bool = False, console: Console | None = None) -> None:
    """Print one row per tool, then a line for each tool that needs an explanation, then the verdict."""
    if as_json:
        print_json(report.to_json())
        return
    console = console or make_console()
    table = make_table(console)
    table.add_column("verdict", no_wrap=True)
    table.add_column("tool", overflow="fold")
    for heading in ("BatchNorms left", "error", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            literal("control" if row.control else row.verdict, console, style=_STYLES[row.verdict]),
            literal(row.tool, console),
            NOTHING if row.batch_norms is None else str(row.batch_norms),
            error_of(row),
            number(report.bound) if row.verdict in ("right", "wrong") and not row.control else NOTHING,
        )
    console.print(table)
    console.print("error: largest |difference| to the network in float64 / largest |output|", style="dim")
    batches = ", ".join(map(str, report.batches))
    console.print(literal(f"bound: {report.rule}; batches of {batches}, seed {report.seed}", console, style="dim"))
    for row in report.rows:
        if text := explanation(row):
            console.print(literal(f"{row.verdict}: {row.tool}: {text}", console, style=_STYLES[row.verdict]))
    for note in report.notes:
        console.print(literal(f"note: {note}", console))
    print_environment(report.environment, console)
    style = _STYLES["wrong" if report.wrong else "right"]
    console.print(literal(report.summary(), console, style=style), soft_wrap=True)


def print_int8_audit(report: Int8Audit, *, as_json: bool = False, console: Console | None = None) -> None:
    """Print one line per check of an int8 file, then the verdict."""
    if as_json:
        print_json({**report.to_json(), "environment": environment()})
        return
    console = console or make_console()
    console.width = min(console.width, _AUDIT_WIDTH)
    table = make_table(console)
    table.add_column("verdict", no_wrap=True)
    table.add_column("check", overflow="fold", max_width=22)
    table.add_column("result", overflow="fold")
    for check in report.checks:
        style = _STYLES.get(check.verdict, "")
        table.add_row(
            *(literal(text, console, style=style) for text in (check.verdict, check.name)), literal(check.text, console)
        )
    console.print(table)
    notes = [f"compared on {report.samples}"]
    if report.bound is not None:
        most = "" if report.largest is None else f", max {report.largest:.2g}"
        notes.append(f"bounds of the kernels: rms {report.bound:.2g}{most} of scale")
    for note in notes:
        console.print(literal(note, console, style="dim"))
    print_environment(environment(), console)
    style = _STYLES["wrong" if report.wrong else "right"]
    console.print(literal(report.summary(), console, style=style), soft_wrap=True)


def error_of(row: AuditRow) -> str:
    """Return the error as a cell: "inf" for answers that can't be compared."""
    return "inf" if row.error == math.inf else number(row.error)


def explanation(row: AuditRow) -> str:
    """Return the explanation of the numbers; "" for a tool that is right."""
    if row.verdict != "wrong":
        return row.reason
    channel = "" if row.channel is None else f", channel {row.channel}"
    parts = (
        f"worst in {row.output}{channel}" if row.output and math.isfinite(row.error or 0.0) else "",
        f"first wrong at BatchNorm {row.batch_norm}" if row.batch_norm else "",
        row.reason,
    )
    return "; ".join(part for part in parts if part)
