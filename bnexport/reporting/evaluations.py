"""What ``evaluate``, ``recalibrate`` and ``inspect --statistics`` found, on a terminal or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from bnexport.evaluating.confusion import TOP_K, ClassScores, wilson_interval
from bnexport.reporting.results import print_json, print_staleness
from bnexport.reporting.summary import NOTHING
from bnexport.reporting.tables import literal, make_console, make_table, print_environment

if TYPE_CHECKING:
    from bnexport.evaluating.evaluate import Evaluation
    from bnexport.evaluating.recalibration import Accuracy, Recalibration

#: Classes that have their row; of more, those with the lowest F1 have one.
LISTED_CLASSES = 20


def print_evaluation(evaluation: Evaluation, *, written: Sequence[str] = ()) -> None:
    """The table of classes, then accuracy with its interval, loss and top-k.

    Args:
        evaluation: What was found.
        written: Files that hold more of it.
    """
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
        told = f"the {len(shown)} of {len(classes)} classes with the lowest F1; --json FILE has all of them"
        console.print(literal(told, console, style="dim"))


def print_recalibration(done: Recalibration, *, as_json: bool = False) -> None:
    """How far the old statistics were, the accuracy before and after, and what was written."""
    if as_json:
        print_json(done.to_json())
        return
    console = make_console()
    print_staleness(done.distance, console)
    facts = done.facts
    how = f"{facts['images']} training images of {facts['dataset']}, batches of {facts['batch_size']}"
    for line in (
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
