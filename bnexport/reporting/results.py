"""Results of the commands on a terminal, or as JSON for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from bnexport.auditing.tool_table import AuditReport, AuditRow
from bnexport.bundle import REPORT, Bundle
from bnexport.environment import environment
from bnexport.evaluating.confusion import TOP_K, ClassScores, wilson_interval
from bnexport.folding.fold_report import FoldReport
from bnexport.reporting.tables import (
    STYLES,
    literal,
    make_console,
    number_column,
    print_checks,
    print_environment,
    print_fold_report,
    print_lines,
    print_table,
    print_verdict,
    text_column,
    word_column,
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
        print_lines(console, "Nothing was written: a bundle appears only with the verdict PASS.")
        return
    size = sum(entry["size"] for entry in bundle.manifest.files.values())
    lines = [f"Bundle: {bundle.path} ({size / 1000:.0f} kB)", f"Report: {bundle.path / REPORT}"]
    if bundle.manifest.packed:
        lines.append(f"model.onnx: {bundle.manifest.packed}: convolutions compute it on more channels.")
    if bundle.manifest.takes_pixels:
        lines.append(
            "Input: pixels as uint8, channels first. Every model file scales them and subtracts the mean itself."
        )
    print_lines(console, *lines, soft_wrap=True)


def print_fold(report: FoldReport, file: Path, *notes: str) -> None:
    """Print the fold report of a single file, notes, and the file with its size."""
    console = make_console()
    print_fold_report(report, console)
    print_lines(console, *notes, f"File: {file} ({file.stat().st_size / 1000:.0f} kB)", soft_wrap=True)


def print_predictions(predictions: Sequence[Prediction], *, as_json: bool = False) -> None:
    """Print label and probability per image; the image's name is last, so that the columns stay aligned."""
    if as_json:
        for prediction in predictions:
            click.echo(json.dumps(prediction.to_json(), allow_nan=False))
        return
    console = make_console()
    columns = text_column("label"), number_column("probability"), text_column("image")
    print_table(console, columns, [(item.label, f"{item.probability:.4f}", item.image) for item in predictions])


def print_statistics(
    inspection: Inspection, *, stale: StalenessReport | None = None, as_json: bool = False, every: bool = False
) -> None:
    """Print a summary, one row per BatchNorm and with ``every`` one per channel, marked channels, and stale statistics."""
    if as_json:
        layers = [layer.to_json() for layer in inspection.layers]
        value: dict[str, Any] = {"file": str(inspection.file), "note": inspection.note, "layers": layers}
        print_json(value if stale is None else {**value, "staleness": stale.to_json()})
        return
    console = make_console()
    print_lines(console, *_summary(inspection))
    heads = ("channels", "eps", "|gamma|", "moving var", "|scale|")
    rows = []
    for layer in inspection.layers:
        spans = (_span(abs(getattr(channel, name)) for channel in layer.channels) for name in _SPANS)
        rows.append((layer.name, str(len(layer.channels)), f"{layer.eps:g}", *spans))
    print_table(console, (text_column("BatchNorm"), *map(number_column, heads)), rows)
    ranges = "ranges: smallest..largest over channels; scale = gamma / sqrt(moving var + eps)"
    print_lines(console, *map(_marks, inspection.layers), ranges, inspection.note)
    if stale is not None:
        print_staleness(stale, console)
        print_lines(console, stale.sentence(), style=STYLES["FAIL"] if stale.stale else None, soft_wrap=True)
    for layer in inspection.layers if every else ():
        _print_channels(layer, console)
    if not every:
        print_lines(console, "--all prints every channel.", style="dim")


#: Columns of a layer that are shown as ranges.
_SPANS = ("gamma", "moving_var", "scale")


def _span(values: Iterable[float]) -> str:
    found = [value for value in values if math.isfinite(value)]
    return f"{min(found):.2g}..{max(found):.2g}" if found else NOTHING


def _print_channels(layer: LayerStatistics, console: Console) -> None:
    heads = ("channel", "gamma", "beta", "moving mean", "moving var", "scale")
    rows = []
    for index, channel in enumerate(layer.channels):
        numbers = (channel.gamma, channel.beta, channel.moving_mean, channel.moving_var, channel.scale)
        rows.append((str(index), *(f"{value:.4g}" for value in numbers), channel.mark))
    title = literal(f"{layer.name} ({len(layer.channels)} channels, eps {layer.eps:g})", console)
    print_table(console, (*map(number_column, heads), text_column("")), rows, title=title)


def print_staleness(report: StalenessReport, console: Console) -> None:
    """Print the distance of each BatchNorm's moving statistics from the exact ones; the caller prints the sentence."""
    heads = ("mean off", "at most", "scale off", "at most", "error")
    rows = [
        (
            layer.name,
            f"{layer.shift:.3f}",
            f"{layer.worst_shift:.3f}",
            f"x {layer.scale:.3f}",
            f"x {layer.worst_scale:.3f}",
            f"{layer.error:.3f}",
            "stale" if report.is_stale(layer) else "",
        )
        for layer in report.layers
    ]
    print_table(console, (text_column("BatchNorm"), *map(number_column, heads), text_column("")), rows)
    print_lines(
        console,
        "mean off: in standard deviations, root mean square over channels; scale off: a factor, either way",
        f"error: change of the layer's output, as a share of its variation; stale above {report.threshold:.2g}",
        style="dim",
    )


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
    low, high = evaluation.interval
    lines = [
        f"{evaluation.subject}: {evaluation.n} test images of {evaluation.dataset}, {evaluation.runtime}",
        f"accuracy {evaluation.accuracy:.4f} (95 % Wilson interval {low:.4f} to {high:.4f};"
        f" {evaluation.correct} of {evaluation.n})",
        f"loss {evaluation.loss:.4f} nats",
    ]
    if evaluation.top is not None:
        lines.append(f"top-{TOP_K} accuracy {evaluation.top:.4f}")
    if evaluation.note:
        lines.append(f"WARNING: {evaluation.note}")
    print_lines(console, *lines, *(f"written: {path}" for path in written), soft_wrap=True)
    print_environment(evaluation.environment, console)


def _print_classes(classes: Sequence[ClassScores], console: Console) -> None:
    shown = list(classes)
    if len(shown) > LISTED_CLASSES:
        shown = sorted(shown, key=lambda row: (row.f1 is None, row.f1 or 0.0))[:LISTED_CLASSES]
    heads = ("precision", "recall", "F1", "support")
    rows = []
    for row in shown:
        shares = (NOTHING if value is None else f"{value:.4f}" for value in (row.precision, row.recall, row.f1))
        rows.append((row.label, *shares, str(row.support)))
    print_table(console, (text_column("class"), *map(number_column, heads)), rows)
    if len(shown) < len(classes):
        note = f"the {len(shown)} of {len(classes)} classes with the lowest F1; --json FILE has all of them"
        print_lines(console, note, style="dim")


def print_recalibration(done: Recalibration, *, as_json: bool = False) -> None:
    """Print the distance of the old statistics, the accuracy before and after, and the written file."""
    if as_json:
        print_json(done.to_json())
        return
    console = make_console()
    print_staleness(done.distance, console)
    facts = done.facts
    how = f"{facts['images']} training images of {facts['dataset']}, batches of {facts['batch_size']}"
    print_lines(
        console,
        *done.notes,
        f"re-estimated over {how}; definition: {facts['definition']}",
        f"test accuracy before: {_accuracy(done.before)}",
        f"test accuracy after:  {_accuracy(done.after)}",
        f"written: {done.out}",
        soft_wrap=True,
    )
    print_environment(done.environment, console)


def _accuracy(found: Accuracy) -> str:
    low, high = wilson_interval(found.correct, found.n)
    return f"{found.correct / found.n:.4f} (95 % {low:.4f} to {high:.4f}, n = {found.n})"


_STYLES = {"right": "green", "wrong": "bold red", "failed": "yellow", "not run": "dim"}


def print_audit(report: AuditReport, *, as_json: bool = False, console: Console | None = None) -> None:
    """Print one row per tool, then a line for each tool that needs an explanation, then the verdict."""
    if as_json:
        print_json(report.to_json())
        return
    console = console or make_console()
    heads = ("BatchNorms left", "error", "bound")
    rows: list[tuple[str | Text, ...]] = [
        (
            literal("control" if row.control else row.verdict, console, style=_STYLES[row.verdict]),
            row.tool,
            NOTHING if row.batch_norms is None else str(row.batch_norms),
            "inf" if row.error == math.inf else number(row.error),  # inf: answers that can't be compared
            number(report.bound) if row.verdict in ("right", "wrong") and not row.control else NOTHING,
        )
        for row in report.rows
    ]
    print_table(console, (word_column("verdict"), text_column("tool"), *map(number_column, heads)), rows)
    batches = ", ".join(map(str, report.batches))
    print_lines(
        console,
        "error: largest |difference| to the network in float64 / largest |output|",
        f"bound: {report.rule}; batches of {batches}, seed {report.seed}",
        style="dim",
    )
    for row in report.rows:
        if text := explanation(row):
            print_lines(console, f"{row.verdict}: {row.tool}: {text}", style=_STYLES[row.verdict])
    print_lines(console, *(f"note: {note}" for note in report.notes))
    print_environment(report.environment, console)
    print_lines(console, report.summary(), style=_STYLES["wrong" if report.wrong else "right"], soft_wrap=True)


def print_int8_audit(report: Int8Audit, *, as_json: bool = False, console: Console | None = None) -> None:
    """Print one line per check of an int8 file, then the verdict."""
    if as_json:
        print_json({**report.to_json(), "environment": environment()})
        return
    console = console or make_console()
    console.width = min(console.width, _AUDIT_WIDTH)
    columns = word_column("verdict"), text_column("check", max_width=22), text_column("result")
    rows: list[tuple[str | Text, ...]] = []
    for check in report.checks:
        style = _STYLES.get(check.verdict, "")
        rows.append((*(literal(text, console, style=style) for text in (check.verdict, check.name)), check.text))
    print_table(console, columns, rows)
    notes = [f"compared on {report.samples}"]
    if report.bound is not None:
        most = "" if report.largest is None else f", max {report.largest:.2g}"
        notes.append(f"bounds of the kernels: rms {report.bound:.2g}{most} of scale")
    print_lines(console, *notes, style="dim")
    print_environment(environment(), console)
    print_lines(console, report.summary(), style=_STYLES["wrong" if report.wrong else "right"], soft_wrap=True)


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
