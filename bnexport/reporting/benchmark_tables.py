"""A benchmark's tables: for a terminal of 80 columns, and the same cells for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column

from bnexport.benchmarking.benchmark_report import UNKNOWN, BenchmarkReport, Result
from bnexport.benchmarking.benchmark_request import Subject
from bnexport.environment import describe
from bnexport.reporting.tables import (
    STYLES,
    number_column,
    print_environment,
    print_lines,
    print_table,
    text_column,
    word_column,
)
from bnexport.verification.verdict import NOTHING

if TYPE_CHECKING:
    from bnexport.reporting.charts import SpeedCurve

#: Heads of the table of speeds, in its order; those in NUMBERS are aligned to the right.
HEADS = ("", "runtime", "batch", "txs", "p50", "p99", "calls", "img/s", "CPU", "ratio", "verdict")
PROCESS_HEADS = ("", "runtime", "file", "import", "load", "first", "memory", "accuracy", "verified")
NUMBERS = frozenset(HEADS[2:-1]) | frozenset(PROCESS_HEADS[2:-1])
LEGEND = (
    "txs: threads inside one call x sessions that call at the same time",
    "p50: median time of a call in ms; p99: 95 % interval, from 300 calls on",
    "img/s: images per second of all sessions; CPU: microseconds per image",
    "ratio: time per image over the first row of this batch size, 95 % interval of",
    "  its rounds; same: no measured difference",
)
PROCESS_LEGEND = (
    "import, load, first: ms to import the engine, open the file, and run the first",
    "  call; memory: peak of the process in MB, over all its rows",
)


def short(value: float) -> str:
    """Return three significant digits without an exponent: "0.0801", "12.3", "5332", "113k"."""
    if value >= 1e4:
        return f"{short(value / 1e3)}k" if value < 1e6 else f"{short(value / 1e6)}M"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def speed_cells(result: Result) -> tuple[str, ...]:
    """Return one text per column of HEADS."""
    variant, tail, ratio = result.variant, result.p99, result.ratio
    if ratio.low == ratio.high == 1.0:
        compared = "1"
    elif ratio.holds_one:
        compared = "same"
    else:
        compared = f"{ratio.low:.2f}-{ratio.high:.2f}" if ratio.high < 10 else f"{ratio.low:.3g}-{ratio.high:.3g}"
    return (
        variant.subject.label,
        variant.runtime.removesuffix("-cpu"),
        str(variant.batch),
        f"{variant.threads}x{variant.sessions}",
        short(result.p50.value * 1e3),
        NOTHING if tail is None else f"{short(tail.low * 1e3)}-{short(tail.high * 1e3)}",
        short(len(result.times)),
        short(result.images_per_second),
        short(result.cpu_per_image * 1e6),
        compared,
        result.word,
    )


def process_cells(report: BenchmarkReport) -> Iterator[tuple[str, ...]]:
    """Yield one text per column of PROCESS_HEADS for each file and runtime."""
    for key in dict.fromkeys((result.variant.subject, result.variant.runtime) for result in report.results):
        own = [item for item in report.results if (item.variant.subject, item.variant.runtime) == key]
        first, verdict = own[0], own[0].verdict
        memory = [item.loaded.memory / 1e6 for item in own if item.loaded.memory]
        yield (
            key[0].label,
            key[1].removesuffix("-cpu"),
            f"{short(key[0].size(key[1]) / 1e6)} MB",
            short(first.loaded.imported * 1e3),
            short(first.loaded.load * 1e3),
            short(first.loaded.first * 1e3),
            f"{short(min(memory))}-{short(max(memory))}" if memory else NOTHING,
            NOTHING if verdict.accuracy is None else f"{verdict.accuracy:.4f}",
            NOTHING if verdict.word == UNKNOWN else verdict.source,
        )


def conclusions(report: BenchmarkReport) -> list[str]:
    """Return the recommendations as sentences, or the reason why no winner is named."""
    if report.no_winner:
        return [f"No winner is named: {report.no_winner}."]
    return [item.sentence for item in report.recommended]


def remarks(report: BenchmarkReport) -> list[str]:
    """Return the bundles by label, their inputs, wrong answers, causes of a FAIL, and the variants that were not measured."""
    found = [f"{subject.label}  {subject.name}: {described(subject, report)}" for subject in report.subjects]
    for result in report.results:
        if result.wrong:
            error, bound = result.error, result.verdict.bound
            found.append(
                f"WRONG {result.variant.name}: the error on the golden vectors is {error:.1e}, more than {bound:.1e}"
            )
    failed = [(item.variant.subject.label, item.variant.runtime, item.verdict) for item in report.results]
    for label, runtime, verdict in dict.fromkeys(failed):
        if verdict.word == "FAIL":
            found.append(f"FAIL {label} {runtime}: {verdict.reason}")
        elif verdict.word == UNKNOWN and label != "-":
            found.append(f"not verified: {label} {runtime}: {verdict.source}")
    return found + [f"not measured: {name}: {why}" for name, why in report.left.items()]


def described(subject: Subject, report: BenchmarkReport) -> str:
    """Return a bundle's precision and its inputs."""
    inputs = report.inputs.get(subject.label)
    words = ", ".join(filter(None, (subject.precision, subject.manifest.packed, inputs)))
    return words if inputs else "onnxruntime's own session, the inputs of A"


def machine_sentence(report: BenchmarkReport) -> str:
    """Return the facts of the machine on which a measurement depends."""
    machine = report.machine
    others = "unknown" if machine["others"] is None else f"{machine['others']:.0%}"
    return (
        f"instructions: {', '.join(machine['instructions']) or 'none of those that are known'}; "
        f"governor: {machine['governor'] or 'unknown'}; load average: {machine['load']} before, "
        f"{machine['load_after']} after; CPU time of other processes: {others}"
    )


def print_benchmark(report: BenchmarkReport, console: Console) -> None:
    """Print the recommendations, the table of speeds, the table of processes, and the conditions."""
    for sentence in conclusions(report):
        print_lines(console, sentence, style=STYLES["FAIL" if report.no_winner else "PASS"])
    print_table(console, map(_column, HEADS), map(speed_cells, report.results))
    print_table(console, map(_column, PROCESS_HEADS), process_cells(report))
    print_lines(console, *LEGEND, *PROCESS_LEGEND, style="dim")
    print_lines(console, *remarks(report), soft_wrap=True)
    print_lines(console, machine_sentence(report), style="dim")
    print_environment(report.environment, console)


def _column(head: str) -> Column:
    if head == "runtime":
        return text_column(head, min_width=12)
    return number_column(head) if head in NUMBERS else word_column("" if head == "verdict" else head)


def curves_of(report: BenchmarkReport) -> list[SpeedCurve]:
    """Return one curve per file, runtime, threads and sessions, over the batch sizes."""
    from bnexport.reporting.charts import SpeedCurve

    gathered: dict[tuple[str, str, int, int], list[Result]] = {}
    for result in report.results:
        gathered.setdefault(result.variant.process, []).append(result)
    colours = list(dict.fromkeys(key[:2] for key in gathered))
    dashes = list(dict.fromkeys(key[2:] for key in gathered))
    return [
        SpeedCurve(
            f"{key[0]} {key[1]}, {key[2]} x {key[3]}"
            + (f" ({rows[0].word})" if rows[0].word not in ("PASS", UNKNOWN) else ""),
            colours.index(key[:2]),
            dashes.index(key[2:]),
            tuple((row.p50.value * 1e3, row.images_per_second) for row in rows),
        )
        for key, rows in gathered.items()
    ]


def plot(report: BenchmarkReport) -> bytes:
    """Return the picture of throughput against latency as an SVG file."""
    from bnexport.reporting.charts import speeds

    return (str(speeds(curves_of(report))) + "\n").encode()


def benchmark_page(report: BenchmarkReport, *, command: str) -> bytes:
    """Return a benchmark as one self-contained page; ``command`` repeats it."""
    from bnexport.reporting.charts import speeds
    from bnexport.reporting.html import page_environment

    speed = [speed_cells(result) for result in report.results]
    page = page_environment().get_template("benchmark.html.jinja")
    text = page.render(
        report=report,
        names=[subject.name for subject in report.subjects if subject.file is None],
        conclusions=conclusions(report),
        chart=speeds(curves_of(report)),
        tables=[
            ("Speed", HEADS, speed, _joined(LEGEND)),
            ("Files and processes", PROCESS_HEADS, list(process_cells(report)), _joined(PROCESS_LEGEND)),
        ],
        numbers=NUMBERS,
        remarks=remarks(report),
        machine=machine_sentence(report),
        environment=describe(dict(report.environment)),
        command=command,
    )
    return text.encode()


def _joined(legend: Sequence[str]) -> str:
    """Return the lines of a legend as one paragraph; a line that begins with spaces continues the line before."""
    return "; ".join(legend).replace(";   ", " ")
