"""``bnexport benchmark``: the fastest runtime among those whose answers are right."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnexport import interrupts
from bnexport.benchmarking.benchmark_request import (
    ALL,
    BATCHES,
    QUICK_BATCHES,
    QUICK_SECONDS,
    SECONDS,
    BenchmarkRequest,
)
from bnexport.benchmarking.spread import LEAST_ROUNDS, ROUNDS
from bnexport.bundle import TUNED
from bnexport.cli.options import PATH, RUNTIME
from bnexport.cli.output import STDOUT, prints_aside, stages, write_json, write_result
from bnexport.errors import OutputError, UsageError
from bnexport.files import refuse_unwritable
from bnexport.optional import need_packages

if TYPE_CHECKING:
    from bnexport.benchmarking.benchmark_report import BenchmarkReport


def _listed(counts: tuple[int, ...]) -> str:
    return ",".join(map(str, counts))


@click.command("benchmark", epilog="Example: bnexport benchmark models/bn_lenet/1 --quick")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=PATH)
@click.option(
    "--against",
    type=PATH,
    metavar="FILE.onnx",
    help="ONNX file to run in ONNX Runtime's own session as the first rows. It is not verified.",
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=RUNTIME,
    metavar="NAME",
    help=f"Measure this runtime only. Repeatable. Runtimes: {', '.join(RUNTIME.choices)}.  "
    "[default: CPU runtimes that work here]",
)
@click.option(
    "--batch", "batches", metavar="N,...",
    help=f"Images per call.  [default: {_listed(BATCHES)}; with --quick {_listed(QUICK_BATCHES)}]",
)  # fmt: skip
@click.option(
    "--threads", default=f"1,{ALL}", show_default=True, metavar="N,...",
    help=f"Threads inside one call; {ALL} is one per core.",
)  # fmt: skip
@click.option(
    "--sessions", default=f"1,{ALL}", show_default=True, metavar="N,...",
    help=f"Sessions that call at the same time; {ALL} is one per core.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(0, 3600, min_open=True),
    help=f"Seconds of measurement per row, over all rounds.  [default: {SECONDS:g}; with --quick {QUICK_SECONDS:g}]",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(min=LEAST_ROUNDS),
    help=f"Rounds, in each of which every row is measured once.  [default: {ROUNDS}; {LEAST_ROUNDS} for slow networks]",
)  # fmt: skip
@click.option(
    "--quick", is_flag=True,
    help="Measure ONNX Runtime and OpenVINO only, two batch sizes, for a shorter time.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed of inputs and order."
)
@click.option("--save", is_flag=True, help="Write the recommended settings into each bundle, as tuned.json.")
@click.option("--json", "json_file", metavar="FILE", help="Write the report as JSON. - prints it instead of the table.")
@click.option("--html", "html_file", metavar="FILE", help="Write the report as one self-contained HTML page.")
@click.option("--plot", "plot_file", metavar="FILE.svg", help="Draw throughput against latency as an SVG file.")
@click.pass_context
def command(ctx: click.Context, /, bundles: tuple[Path, ...], **options: Any) -> None:
    """Measure BUNDLEs on every runtime, and name the fastest one whose answers are right.

    Each row is a bundle in one runtime with one batch size, number of threads and number of sessions. All rows are measured
    in turn, round by round. A row is recommended only if verify's verdict on its file and runtime is PASS and its answers
    to the golden vectors (inputs and outputs stored at export) were right during the measurement. On a busy machine no
    row is recommended.

    Exit codes: 0 done, 1 no row is right, 2 bad input, 3 a requested runtime can't run here.
    """
    outputs = _outputs(options)
    for bundle in bundles if options["save"] else ():
        refuse_unwritable(bundle / TUNED)
    request = BenchmarkRequest(
        bundles,
        options["against"],
        options["runtimes"],
        batches=tuple(count for count in _counts(options["batches"], "--batch") if isinstance(count, int)),
        threads=_counts(options["threads"], "--threads", every=True),
        sessions=_counts(options["sessions"], "--sessions", every=True),
        **{name: options[name] for name in ("seconds", "rounds", "quick", "seed")},
    )
    need_packages("bnexport benchmark", "onnxruntime")
    if outputs["html_file"] or outputs["plot_file"]:
        need_packages("bnexport benchmark --html and --plot", "jinja2", "markupsafe")
    from bnexport.benchmarking.benchmark import benchmark

    with prints_aside(), stages() as progress, interrupts.terminable():
        report = benchmark(request, progress=progress)
    if outputs["json_file"] != STDOUT:
        from bnexport.reporting.benchmark_tables import print_benchmark
        from bnexport.reporting.tables import make_console

        print_benchmark(report, make_console())
    if report.interrupted:
        _write_files(report, {"json_file": outputs["json_file"]})
        raise KeyboardInterrupt
    _write_files(report, outputs)
    if options["save"]:
        from bnexport.benchmarking.benchmark import save_tunings

        for path in save_tunings(report):
            click.echo(f"Saved {path}", err=outputs["json_file"] == STDOUT)
    ctx.exit(0 if report.right else 1)


def _outputs(options: dict[str, Any]) -> dict[str, str | None]:
    """Return the files to write; refuse two results in one file, a picture that is not an SVG, and unwritable files."""
    files = {name: options[name] for name in ("json_file", "html_file", "plot_file")}
    seen: set[Path] = set()
    for file in filter(None, reversed(files.values())):  # the first of two is named
        if (place := Path(file).resolve()) in seen:
            raise UsageError(f"two results would be written to {file}", remedy="Give each a separate file")
        seen.add(place)
        if file != STDOUT:
            refuse_unwritable(Path(file))
    if files["plot_file"] is not None and not files["plot_file"].lower().endswith(".svg"):
        raise OutputError(f"--plot {files['plot_file']} is not a .svg file", remedy="Choose this suffix")
    return files


def _counts(text: str | None, flag: str, *, every: bool = False) -> tuple[int | str, ...]:
    """Return a text like "1,8,all" as numbers; UsageError for other texts. ``every`` allows "all"."""
    found: list[int | str] = []
    for part in text.split(",") if text is not None else ():
        word = part.strip()
        if every and word == ALL:
            found.append(word)
        elif word.isascii() and word.isdigit() and len(word) < 10:
            found.append(int(word))
        else:
            example = f"1,{ALL}" if every else _listed(BATCHES)
            raise UsageError(f"{flag} {text!r} is not a list of whole numbers", remedy=f"Write it as {flag} {example}")
    return tuple(found)


def _write_files(report: BenchmarkReport, outputs: dict[str, str | None]) -> None:
    if (target := outputs.get("json_file")) is not None:
        write_json(target, report.to_json())
    if (target := outputs.get("html_file")) is not None:
        from bnexport.reporting.benchmark_tables import benchmark_page

        write_result(target, benchmark_page(report, command=shlex.join(["bnexport", *sys.argv[1:]])))
    if (target := outputs.get("plot_file")) is not None:
        from bnexport.reporting.benchmark_tables import plot

        write_result(target, plot(report))
