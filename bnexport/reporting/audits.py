"""An audit on a terminal, or as JSON for a program."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bnexport.auditing.report import AuditReport, AuditRow
from bnexport.reporting.results import print_json
from bnexport.reporting.summary import NOTHING, number
from bnexport.reporting.tables import literal, make_console, make_table, print_environment

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"right": "green", "wrong": "bold red", "failed": "yellow", "not run": "dim"}


def print_audit(report: AuditReport, *, as_json: bool = False, console: Console | None = None) -> None:
    """One row per tool, then a line for each that is not simply right, then the verdict."""
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


def error_of(row: AuditRow) -> str:
    """The error as a cell: "inf" for answers that can't be compared."""
    return "inf" if row.error == math.inf else number(row.error)


def explanation(row: AuditRow) -> str:
    """What a reader wants to know beside the numbers; "" for a tool that is simply right."""
    if row.verdict != "wrong":
        return row.reason
    channel = "" if row.channel is None else f", channel {row.channel}"
    parts = (
        f"worst in {row.output}{channel}" if row.output and math.isfinite(row.error or 0.0) else "",
        f"first wrong at BatchNorm {row.batch_norm}" if row.batch_norm else "",
        row.reason,
    )
    return "; ".join(part for part in parts if part)
