"""Reports on a terminal: 80 columns are enough, ASCII is enough, and no verdict depends on colour."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bnexport.environment import describe
from bnexport.files import forget_reader
from bnexport.folding.fold_report import GONE, OUTCOMES, FoldOutcome, FoldReport, FoldRow
from bnexport.plain_table import printable
from bnexport.reporting.summary import (
    FILE_CHECKS,
    KERNEL_STAGES,
    ReportedRun,
    certified,
    class_name,
    file_groups,
    flips,
    int8_outside,
    int8_sentence,
    module_name,
    runs,
)
from bnexport.verification.verdict import NOTHING, FaultResult, VerificationReport, number, word

#: Outcome of a fault -> its words in a sentence, in the order of the tables: missed faults first.
FAULT_OUTCOMES: dict[str, str] = {
    "missed": "MISSED",
    "not tried": "not tried here",
    "harmless": "harmless to this model",
    "caught": "caught",
}


def ordered_faults(report: VerificationReport) -> list[FaultResult]:
    """Return the faults: missed ones first, then not tried, harmless and caught ones; empty without a self-test."""
    order = list(FAULT_OUTCOMES)
    faults = report.findings.self_test or ()
    return sorted(faults, key=lambda fault: order.index(fault.outcome) if fault.outcome in order else len(order))


def self_test_sentence(report: VerificationReport) -> str:
    """Return "27 faults: 2 harmless to this model, 25 caught"; "" without a self-test."""
    faults = report.findings.self_test
    if faults is None:
        return ""
    counted = [(name, sum(fault.outcome == outcome for fault in faults)) for outcome, name in FAULT_OUTCOMES.items()]
    parts = ", ".join(f"{count} {name}" for name, count in counted if count)
    return f"{len(faults)} fault{'' if len(faults) == 1 else 's'}" + (f": {parts}" if parts else "")


@dataclass(frozen=True)
class Tally:
    """The number of BatchNorm calls with one outcome by one rule."""

    outcome: FoldOutcome  # A key of OUTCOMES
    rule: str  # "" for none
    count: int  # At least 1
    dead: int  # Number of channels with the scale 0, over all calls


def tallies(report: FoldReport) -> tuple[Tally, ...]:
    """Return the rows counted by outcome and rule: outcomes in the order of OUTCOMES, the most frequent rule first."""
    gathered: dict[tuple[FoldOutcome, str], list[FoldRow]] = {}
    for row in report.rows:
        gathered.setdefault((row.outcome, row.rule), []).append(row)
    order = list(OUTCOMES)
    ranked = sorted(gathered.items(), key=lambda item: (order.index(item[0][0]), -len(item[1]), item[0][1]))
    return tuple(Tally(outcome, rule, len(rows), sum(row.dead for row in rows)) for (outcome, rule), rows in ranked)


def growth_of(report: FoldReport) -> str:
    """Return the growth of the weights as a sentence; "" if there is none."""
    if report.growth <= 1.005:
        return ""
    return f"the weights are {report.growth:.2f} times as large as before: shared ones had to be cloned"


def gain_of(row: FoldRow) -> str:
    """Return the smallest and largest |scale| as '0.12..3.4', one number if they are equal, NOTHING if unknown."""
    if row.gain is None:
        return NOTHING
    low, high = map(number, row.gain)
    return low if low == high else f"{low}..{high}"


#: Largest number of letters in a cell of the terminal's table: at most four lines in 80 columns.
_LONGEST_CELL = 100


def outcome_cell(row: FoldRow) -> tuple[str, bool]:
    """Return the layer that holds a BatchNorm's numbers now, or the reason and hint, as a cell; True if it is cut."""
    whole = [row.into or row.rule, row.reason, f"would go with: {row.hint}" if row.hint else ""]
    short = [row.into or row.rule, row.short_reason]
    dead = f"{row.dead} dead channel{'' if row.dead == 1 else 's'}" if row.dead else ""
    texts = ["; ".join(filter(None, (*parts, dead))) or NOTHING for parts in (whole, short)]
    text = next((text for text in texts if len(text) <= _LONGEST_CELL), f"{texts[1][: _LONGEST_CELL - 3].rstrip()}...")
    return text, text != texts[0]


#: Colour of a word in a table; the word itself carries the meaning.
STYLES: dict[str, str] = {
    "PASS": "bold green",
    "FAIL": "bold red",
    **{outcome: "green" if outcome in GONE else "yellow" for outcome in OUTCOMES},
}
#: Number of failures that are printed: one fault fails every runtime on every input, so the first ones show the cause.
_LISTED_FAILURES = 8
#: Number of samples with a changed label that are printed, unexplained ones first.
_LISTED_RANGES = 4
_LISTED_FLIPS = 8
#: Largest number of BatchNorm calls with one row each; of more, removed ones are counted by outcome and rule.
_LISTED_CALLS = 30
#: Columns of the table of runtimes, one line each.
LEGEND = (
    "golden vectors: inputs and outputs stored in the bundle at export, replayed here",
    "max error: largest |difference| / largest |reference output| (error of scale)",
    "x predicted noise: max error / the error predicted for this precision and model",
    "across batch sizes: the same samples in other batch sizes, and a second time",
    "labels changed: class differs from that of the network before the fold",
    "labels proven stable: no error within the bound can change the class",
)
_NO_DRIVER = "no NVIDIA driver"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Print nothing more after the reader has closed the pipe; the exit code still reports the verdict."""
        self.quiet = True
        forget_reader()


def make_console(stderr: bool = False) -> Console:
    """Return a console without markup and emoji codes, so that labels are printed literally; ``stderr``: on standard error."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_fold_report(report: FoldReport, console: Console) -> None:
    """Print the outcome of each BatchNorm call, after a summary and the warnings; of many calls, count removed ones."""
    print_lines(console, report.summary(why=False), soft_wrap=True)
    print_lines(console, *(f"WARNING: {warning}" for warning in report.warnings), style=STYLES["FAIL"])
    print_lines(console, growth_of(report), soft_wrap=True)
    rows = list(report.rows)
    if len(rows) > _LISTED_CALLS:
        _print_tallies(report, console)
        rows = [row for row in rows if not row.gone]
    if rows:
        _print_calls(rows, console)


def _print_tallies(report: FoldReport, console: Console) -> None:
    columns = (number_column("calls"), word_column("outcome"), text_column("rule"), text_column("what it means"))
    rows: list[list[str | Text]] = []
    meanings = dict(OUTCOMES)
    for tally in tallies(report):
        meaning = literal(meanings.pop(tally.outcome, ""), console, style="dim")  # once each
        rows.append([str(tally.count), tally.outcome, tally.rule or NOTHING, meaning])
    print_table(console, columns, rows)


def _print_calls(rows: Sequence[FoldRow], console: Console) -> None:
    names, reasons = text_column("BatchNorm", max_width=28), text_column("folded into, or why not")
    kind = " ({})" if len({row.kind for row in rows}) > 1 else ""
    cells = (
        (
            row.outcome,
            module_name(row.module) + kind.format(row.kind),
            outcome_cell(row)[0],
            gain_of(row) if row.channels else NOTHING,
        )
        for row in rows
    )
    print_table(console, (word_column("outcome"), names, reasons, number_column("|scale|")), cells)
    shown = [outcome for outcome in OUTCOMES if any(row.outcome == outcome for row in rows)]
    gone = ", ".join(outcome for outcome in shown if outcome in GONE)
    notes = [f"{gone}: gone, now part of other layers' weights"] if gone else []
    notes += [f"{outcome}: {OUTCOMES[outcome]}" for outcome in shown if outcome not in GONE]
    notes.append("|scale|: smallest..largest |gamma / sqrt(var + eps)|")
    if any(outcome_cell(row)[1] for row in rows):
        notes.append("Reasons are shortened: --json prints them whole, with what would help.")
    print_lines(console, *notes, style="dim")


def print_verification(
    report: VerificationReport,
    console: Console,
    *,
    labels: Sequence[str] | None = None,
    advice: str = "",
    verbose: bool = False,
) -> None:
    """Print the verdict, then the checks behind it; the arguments are those of the two functions below."""
    print_verdict(report, console, advice=advice)
    print_checks(report, console, labels=labels, verbose=verbose)


def print_verdict(report: VerificationReport, console: Console, *, advice: str = "") -> None:
    """Print the verdict as one line, then the first failures and every warning.

    ``advice`` follows the coverage of a verdict that covers a part of the proof.
    """
    print_lines(console, report.summary(advice=advice), style=STYLES[word(report.passed)], soft_wrap=True)
    for row in report.failures[:_LISTED_FAILURES]:
        print_lines(console, f"FAIL {row.stage}, {row.run}, {row.case}: {row.reason}", style=STYLES["FAIL"])
    if (more := len(report.failures) - _LISTED_FAILURES) > 0:
        print_lines(console, f"and {more} more failed comparisons: --json lists them")
    print_lines(console, *(f"WARNING: {warning}" for warning in report.findings.warnings))


def print_checks(
    report: VerificationReport, console: Console, *, labels: Sequence[str] | None = None, verbose: bool = False
) -> None:
    """Print the files and the runtimes with their largest errors, the findings, and the parts that were not run.

    ``labels`` are the class names of changed labels. With ``verbose``, every part that was not run has its whole reason.
    """
    lines = runs(report)
    _print_files(report, console)
    _print_runs(lines, console)
    facts = (("inputs", report.inputs), ("compared", report.coverage), ("reference", report.reference))
    notes = [f"{name}: {text}" for name, text in facts if text]
    print_lines(console, *notes, *_found(report, lines), style="dim")
    print_lines(console, *(_int8_lines(report) if verbose else ()))
    _print_flips(report, console, labels)
    _print_self_test(report, console)
    print_lines(console, *not_run(report.skipped, console.width, verbose=verbose))
    if not report.passed:  # a verdict PASS contains these sentences
        print_lines(console, *(f"not run: {sentence}" for sentence in report.findings.waived.values()))


def not_run(skipped: Mapping[str, str], width: int = 80, *, verbose: bool = False) -> list[str]:
    """Return one line per cause for the parts that were not run, cut to ``width``; with ``verbose`` one per part, whole."""
    if verbose:
        return [f"not run: {name}: {why}" for name, why in skipped.items()]
    causes: dict[str, list[str]] = {}
    for name, why in skipped.items():
        causes.setdefault(cause_of(why), []).append(name)
    lines = []
    for cause, names in causes.items():
        line = f"not run: {', '.join(names)}: {cause}"
        if len(line) > width and len(names) > 1:
            kind = "GPU runtimes" if cause == _NO_DRIVER else "parts"
            line = f"not run: {len(names)} {kind}: {cause} (--verbose lists them)"
        lines.append(line if len(line) <= width else f"{line[: width - 4]} ...")
    return lines


def cause_of(reason: str) -> str:
    """Return the first clause of a reason, without the runner's name, which the line has already.

    A missing NVIDIA driver, which each engine words differently, has one text.
    """
    if "NVIDIA driver" in reason:
        return _NO_DRIVER
    return re.sub(r"^the \w+ runner ", "", re.split(r"; | \(|, so |\. ", reason, maxsplit=1)[0])


def _print_files(report: VerificationReport, console: Console) -> None:
    """Print the checks made without an engine, and the checks that no runtime reached."""
    gathered = file_groups(report)
    if not gathered:
        return
    columns = [
        *map(word_column, ("", "check of files")),
        text_column("file", min_width=10),
        *map(number_column, ("compared", "max error", "bound")),
        text_column("passes if", min_width=20),
    ]
    meanings, rows = dict(FILE_CHECKS), []
    for group in gathered:
        numbers = (str(group.n), *group.worst_numbers)
        meaning = literal(meanings.pop(group.stage, ""), console, style="dim")  # once each
        rows.append((word(group.passed), group.stage, group.subject, *numbers, meaning))
    print_table(console, columns, rows)


def _print_runs(lines: Sequence[ReportedRun], console: Console) -> None:
    """Print one line per runtime and settings. A stage that failed has FAIL in place of its number."""
    if not lines:
        return
    heads = ["\ngolden\nvectors", "\nmax\nerror", "x\npredicted\nnoise", "across\nbatch\nsizes"]
    heads += ("\nlabels\nchanged", "labels\nproven\nstable")
    rows = []
    for run in lines:
        kernels = run.kernels
        flipped = kernels.flips if kernels else None
        cells = (
            _stage_cell(run, ("golden",)),
            _stage_cell(run, tuple(KERNEL_STAGES)),
            number(kernels.ratio if kernels else None),
            _stage_cell(run, ("batch-size", "repeat")),
            NOTHING if flipped is None else str(flipped.explained + flipped.unexplained),
            certified(flipped),
        )
        rows.append((word(run.passed), run.name, *cells))
    runtime = text_column("\n\nruntime", min_width=17)
    print_table(console, (word_column(""), runtime, *map(number_column, heads)), rows)
    print_lines(console, *LEGEND, *_bounds(lines), style="dim")


def _stage_cell(run: ReportedRun, stages: Sequence[str]) -> str:
    """Return the largest error of some stages, FAIL where one failed, "ok" where none has a number."""
    rows = [row for stage in stages if stage in run.stages for row in run.stages[stage].rows]
    if not rows:
        return NOTHING
    if not all(row.passed for row in rows):
        return "FAIL"
    errors = [row.error for row in rows if row.error is not None]
    return number(max(errors)) if errors else "ok"


def _bounds(lines: Sequence[ReportedRun]) -> list[str]:
    """Return one line per stage of the kernels, with its bound: "strict: ...; max error at most 1e-05"."""
    found = []
    for stage, meaning in KERNEL_STAGES.items():
        rows = [row for run in lines if stage in run.stages for row in run.stages[stage].rows]
        bounds = sorted(row.bound for row in rows if row.bound is not None)
        if bounds:
            low, high = number(bounds[0]), number(bounds[-1])
            found.append(f"{stage}: {meaning}; max error at most {low if low == high else f'{low} to {high}'}")
    return found


def _found(report: VerificationReport, lines: Sequence[ReportedRun]) -> list[str]:
    """Return lines on predictions, precisions that are not float32, accuracy, and layers outside their prediction."""
    found = []
    for item in report.findings.predictions:
        labels = "" if item.flips is None else f", {item.flips} of {item.n} labels changed"
        found.append(f"predicted in {item.precision}: max error {number(item.error)}{labels} ({item.inputs})")
    for run in lines:
        found += [f"{run.name}: {row.reason}" for row in run.rows if row.detected not in ("", "float32") and row.passed]
    same: dict[str, list[str]] = {}
    for run in lines:
        for row in run.stages["accuracy-change"].rows if "accuracy-change" in run.stages else ():
            same.setdefault(row.reason, []).append(run.name)
    for reason, names in same.items():
        found.append(f"accuracy: {reason}: {'every runtime' if len(names) == len(lines) else '; '.join(names)}")
    for name, layers in report.findings.drift.items():
        first = next((layer for layer in layers if layer.left), None)
        if first is not None:
            found.append(
                f"{name}: {first.layer} ({first.operator}) is the first layer with more than its predicted error:"
                f" {number(first.error)}, {number(first.predicted)} predicted"
            )
    return found


def _int8_lines(report: VerificationReport) -> Iterator[str]:
    """Yield the noisiest layers of an int8 file, the origins of its ranges, and the ranges that samples exceed."""
    found = report.findings.int8
    if found is None:
        return
    yield f"int8: {int8_sentence(found)}"
    counts = Counter(item.source for item in found.ranges)
    yield f"int8 ranges by origin: {', '.join(f'{source} {n}' for source, n in counts.items())}"
    for item in int8_outside(found)[:_LISTED_RANGES]:
        assert item.seen is not None
        trained = "" if item.trained is None else f", trained {item.trained[0]:.3g} to {item.trained[1]:.3g}"
        yield (
            f"{item.tensor}: {item.low:.3g} to {item.high:.3g} ({item.source}){trained};"
            f" {found.n} {found.inputs} reach {item.seen[0]:.3g} to {item.seen[1]:.3g}"
        )


def _print_flips(report: VerificationReport, console: Console, labels: Sequence[str] | None) -> None:
    changed = flips(report)
    for flip in changed[:_LISTED_FLIPS]:
        item = flip.sample
        true = "" if item.label is None else f" (true {class_name(item.label, labels)})"
        before, after = class_name(item.reference, labels), class_name(item.candidate, labels)
        why = "explained" if item.explained else "NOT explained"
        print_lines(
            console,
            f"label changed, sample {item.index}: {before} -> {after}{true}, margin {number(item.margin)}, {why};"
            f" {'; '.join(flip.runs)}",
            style="dim" if item.explained else STYLES["FAIL"],
        )
    if (more := len(changed) - _LISTED_FLIPS) > 0:
        print_lines(console, f"and {more} more changed labels: --json lists them", style="dim")


def _print_self_test(report: VerificationReport, console: Console) -> None:
    faults = ordered_faults(report)
    if faults:
        missed = literal("MISSED", console, style=STYLES["FAIL"])
        rows = (
            (
                missed if fault.outcome == "missed" else fault.outcome,
                fault.fault,
                fault.where,
                fault.expected,
                ", ".join(fault.caught) or "nothing",
            )
            for fault in faults
        )
        heads = ("fault", "where", "made for it", "caught by")
        print_table(console, (word_column("self-test"), *map(text_column, heads)), rows)
    if sentence := self_test_sentence(report):
        print_lines(console, f"self-test: {sentence}", style=STYLES["FAIL"] if report.missed else "")


def print_environment(record: Mapping[str, Any], console: Console) -> None:
    """Print hardware and versions in one paragraph, as the conditions of the numbers above it."""
    print_lines(console, describe(dict(record)), style="dim")


def word_column(head: str) -> Column:
    """Return a column of words that are never wrapped."""
    return Column(head, no_wrap=True)


def text_column(head: str, *, min_width: int | None = None, max_width: int | None = None) -> Column:
    """Return a column of texts that are wrapped where space is scarce."""
    return Column(head, overflow="fold", min_width=min_width, max_width=max_width)


def number_column(head: str) -> Column:
    """Return a column of numbers, aligned to the right."""
    return Column(head, justify="right", no_wrap=True)


def print_table(
    console: Console, columns: Iterable[Column], rows: Iterable[Sequence[str | Text]], *, title: Text | None = None
) -> None:
    """Print a table with lines that the console's encoding can show; texts without a style are literal."""
    plain = not console.encoding.lower().startswith("utf")
    # ASCII lines touch adjacent words; the other lines are spaces, and a second space would widen each column.
    style, padding = (box.ASCII, (0, 1, 0, 0)) if plain else (box.SIMPLE_HEAD, (0, 0, 0, 0))
    table = Table(*columns, box=style, header_style="bold", padding=padding, pad_edge=False)
    table.title, table.title_justify = title, "left"
    for cells in rows:
        table.add_row(*(literal(cell, console) if isinstance(cell, str) else cell for cell in cells))
    console.print(table)


def print_lines(console: Console, *texts: str, style: str | None = None, soft_wrap: bool = False) -> None:
    """Print literal lines; an empty text is left out. ``soft_wrap`` leaves the wrapping of long lines to the terminal."""
    for text in filter(None, texts):
        console.print(literal(text, console, style=style), soft_wrap=soft_wrap)


def literal(value: str, console: Console, *, style: str | None = None) -> Text:
    """Return literal text in the console's encoding, without characters that control the terminal."""
    safe = printable(value).encode(console.encoding, "replace").decode(console.encoding)
    return Text(safe, style=STYLES.get(safe, "") if style is None else style)
