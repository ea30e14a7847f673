"""Reports on a terminal: 80 columns are enough, ASCII is enough, and no verdict depends on colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnexport.environment import describe
from bnexport.files import forget_reader
from bnexport.folding.report import GONE, OUTCOMES, FoldReport, FoldRow
from bnexport.reporting.fold_summary import account_of, gain_of, growth_of, tallies, verdict_of
from bnexport.reporting.summary import (
    NOTHING,
    certified,
    groups,
    module_name,
    number,
    predicted_sentences,
    run_name,
    word,
)

if TYPE_CHECKING:
    from bnexport.verification.verdict import VerificationReport

#: Colour of a word in a table; the word itself carries the meaning.
STYLES: dict[str, str] = {
    "PASS": "bold green",
    "FAIL": "bold red",
    **{outcome: "green" if outcome in GONE else "yellow" for outcome in OUTCOMES},
}
#: Failed rows that are printed with their reason: one fault fails every runtime on every input, and the first tells it.
_LISTED_FAILURES = 8
#: BatchNorm calls up to which each has its row; of more, those that are gone are counted by outcome and rule.
_LISTED_CALLS = 30


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on in silence when the reader went away: the exit code still has to tell the verdict."""
        self.quiet = True
        forget_reader()


def make_console(stderr: bool = False) -> Console:
    """A console for reports: no markup, no emoji codes, so that a hostile label is printed as it is.

    Args:
        stderr: Write to standard error, for what is not the result itself.
    """
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_fold_report(report: FoldReport, console: Console) -> None:
    """What became of each BatchNorm call. Warnings come first; of many calls those that are gone are only counted."""
    for warning in report.warnings:
        console.print(literal(f"WARNING: {warning}", console, style=STYLES["FAIL"]))
    rows = list(report.rows)
    if len(rows) > _LISTED_CALLS:
        _print_tallies(report, console)
        rows = [row for row in rows if not row.gone]
    if rows:
        _print_calls(rows, console)
    for sentence in (growth_of(report), verdict_of(report)):
        if sentence:
            console.print(literal(sentence, console), soft_wrap=True)


def _print_tallies(report: FoldReport, console: Console) -> None:
    table = make_table(console)
    table.add_column("calls", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("rule", overflow="fold")
    table.add_column("what it means", overflow="fold")
    meanings = dict(OUTCOMES)
    for tally in tallies(report):
        meaning = meanings.pop(tally.outcome, "")  # once each
        table.add_row(
            str(tally.count),
            literal(tally.outcome, console),
            literal(tally.rule or NOTHING, console),
            literal(meaning, console, style="dim"),
        )
    console.print(table)


def _print_calls(rows: Sequence[FoldRow], console: Console) -> None:
    table = make_table(console)
    table.add_column("outcome", no_wrap=True)
    table.add_column("BatchNorm", overflow="fold")
    table.add_column("into what, or why not", overflow="fold")
    table.add_column("|scale|", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            literal(row.outcome, console),
            literal(f"{module_name(row.module)} ({row.kind}, {row.channels})", console),
            literal(account_of(row), console),
            gain_of(row) if row.channels else NOTHING,
        )
    console.print(table)


def print_verification(report: VerificationReport, console: Console) -> None:
    """One row per stage and subject with its worst comparison, then each failure with its reason, then the verdict."""
    table = make_table(console)
    table.add_column("", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("subject", overflow="fold", min_width=17)
    for heading in ("n", "error", "bound", "flips", "sure"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups(report):
        worst = group.worst
        table.add_row(
            literal(word(group.passed), console),
            literal(group.stage, console),
            literal(group.subject, console),
            str(group.n),
            number(worst.error if worst else None),
            number(worst.bound if worst else None),
            NOTHING if group.flips is None else str(group.flips.explained + group.flips.unexplained),
            certified(group.flips),
        )
    if report.rows:
        console.print(table)
        console.print("error: largest |difference| / largest |reference|, worst case of each row", style="dim")
        console.print("sure: labels that no error within the bound could change", style="dim")
    for note in (report.inputs, report.reference, *predicted_sentences(report)):
        if note:
            console.print(literal(note, console, style="dim"))
    for warning in report.findings.warnings:
        console.print(literal(f"WARNING: {warning}", console))
    for name, why in report.skipped.items():
        console.print(literal(f"not run: {name}: {why}", console))
    for row in report.failures[:_LISTED_FAILURES]:
        console.print(
            literal(f"FAIL {row.stage}, {run_name(row)}, {row.case}: {row.reason}", console, style=STYLES["FAIL"])
        )
    if (more := len(report.failures) - _LISTED_FAILURES) > 0:
        console.print(literal(f"and {more} more failed rows, all of them in the JSON report", console))
    style = STYLES[word(report.passed)]
    console.print(literal(report.summary(), console, style=style), soft_wrap=True)


def print_environment(record: Mapping[str, Any], console: Console) -> None:
    """Hardware and versions in one paragraph, as the conditions of the numbers above it."""
    console.print(literal(describe(dict(record)), console, style="dim"))


def make_table(console: Console) -> Table:
    """An empty table with the lines that the console's encoding can show."""
    plain = not console.encoding.lower().startswith("utf")
    # ASCII lines touch the words beside them; the others are spaces, and a second space would cost a column its width.
    style, padding = (box.ASCII, (0, 1, 0, 0)) if plain else (box.SIMPLE_HEAD, (0, 0, 0, 0))
    return Table(box=style, header_style="bold", padding=padding, pad_edge=False)


def literal(value: str, console: Console, *, style: str | None = None) -> Text:
    """Literal text that the console's encoding can take and that can't steer the terminal (no escape sequences)."""
    printable = "".join(char if char.isprintable() else "?" for char in value)
    safe = printable.encode(console.encoding, "replace").decode(console.encoding)
    return Text(safe, style=STYLES.get(safe, "") if style is None else style)
