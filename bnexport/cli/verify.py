"""``bnexport verify``: one bundle in, PASS or FAIL out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnexport.cli.options import PATH, RUNTIME, DatasetName
from bnexport.cli.output import STDOUT, counting, prints_aside, stages, write_json, write_result
from bnexport.optional import need_packages, require
from bnexport.runtimes.base import CONV_SEARCHES, KERNEL_PRECISIONS, OPTIMISATIONS

if TYPE_CHECKING:
    from torch import nn

    from bnexport.bundle import Bundle
    from bnexport.verification.verdict import VerificationReport


@click.command(name="verify", epilog="Example: bnexport verify models/bn_lenet/1 --html report.html")
@click.argument("bundle", type=PATH)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=RUNTIME,
    metavar="NAME",
    help=f"Verify on this runtime only. Repeatable. Runtimes: {', '.join(RUNTIME.choices)}.  "
    "[default: all that work here]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(KERNEL_PRECISIONS),
    help="Precision of the kernels. Repeatable.  [default: float32, and the one that each runtime is served with]",
)
@click.option(
    "--optimisation",
    "optimisations",
    multiple=True,
    type=click.Choice(OPTIMISATIONS),
    help="ONNX Runtime's level of graph optimisation. Repeatable.  [default: all, as in serving]",
)
@click.option(
    "--io-binding", is_flag=True, help="Run ONNX Runtime also with inputs and outputs bound to the device's memory."
)
@click.option(
    "--conv-search",
    "conv_searches",
    multiple=True,
    type=click.Choice(CONV_SEARCHES),
    help="Method by which cuDNN chooses the algorithm of a convolution. Repeatable.  [default: heuristic]",
)
@click.option(
    "--dataset",
    type=DatasetName(),
    help="Data set to verify on. A folder is read only if this option or --data-dir names it.  [default: BUNDLE's own]",
)
@click.option(
    "--data-dir",
    type=PATH,
    help="Folder of the data set's files. Nothing is downloaded.  [default: BNEXPORT_DATA, then the cache]",
)
@click.option(
    "--samples", type=PATH, help="Your own inputs instead of the data set's images: .npy, .npz, or a folder of images."
)
@click.option("--max-samples", type=click.IntRange(min=1), help="Largest number of samples of each kind.")
@click.option(
    "--thorough",
    is_flag=True,
    help="Compare at least 16 samples of each kind and every batch size, however large the network is.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed of the synthetic inputs."
)
@click.option(
    "--drift/--no-drift",
    default=None,
    help="Compare the outputs of every layer.  [default: where it is cheap, and where a runtime failed]",
)
@click.option(
    "--source",
    metavar="FILE.py:FACTORY",
    help="Code of the original network, for a bundle of your own model. The weights come from the bundle.",
)
@click.option(
    "--self-test",
    "with_self_test",
    is_flag=True,
    help="Also put faults into copies of the bundle, and show which check catches each. A missed fault is a FAIL.",
)
@click.option(
    "--allow-low-accuracy", is_flag=True, help="Accept an original network whose accuracy is at or below chance."
)
@click.option("--verbose", is_flag=True, help="Print the whole reason for every runtime that was not run.")
@click.option("--json", "json_file", metavar="FILE", help="Write the report as JSON. - prints it instead of the table.")
@click.option("--junit", "junit_file", metavar="FILE", help="Write the report as JUnit XML, for CI systems.")
@click.option("--html", "html_file", metavar="FILE", help="Write the report as one self-contained HTML page.")
@click.pass_context
def command(ctx: click.Context, /, bundle: Path, **options: Any) -> None:
    """Prove that BUNDLE computes what its network computes: exit 0 for PASS, 1 for FAIL.

    Checks the hash of every file, replays the golden vectors (inputs and outputs stored at export), proves the written
    files in float64, and compares each runtime with the original network on real images and synthetic inputs: in strict
    float32 (full precision), and in the shipping precision (the one it is served with).
    """
    from bnexport.bundle import Bundle
    from bnexport.reporting.tables import make_console, print_environment, print_lines, print_verification
    from bnexport.verification.full_check import full_check

    if options["html_file"] is not None:
        need_packages("bnexport verify --html", "jinja2", "PIL")
    if options["with_self_test"]:
        need_packages("bnexport verify --self-test", "torch", "onnx", "safetensors")
    opened = Bundle.open(bundle)
    with prints_aside():
        report = _verified(opened, options)
    _write_files(report, opened, bundle, options)
    if options["json_file"] != STDOUT:
        console = make_console()
        needs, full = full_check(opened, bundle) if report.findings.covers else ("", "")
        advice = f"; give {needs} for the full check" if needs else ""
        print_verification(report, console, labels=opened.manifest.labels, advice=advice, verbose=options["verbose"])
        if full:
            print_lines(console, f"Full check: {full}", soft_wrap=True)
        print_environment(report.environment, console)
    ctx.exit(0 if report.passed else 1)


def _verified(opened: Bundle, options: dict[str, Any]) -> VerificationReport:
    from bnexport.verification.scope import Scope
    from bnexport.verification.verify import verify

    module: nn.Module | None = None
    if options["source"] is not None:
        require("torch", purpose="--source")
        from bnexport.evaluating.network import network_of_bundle

        module = network_of_bundle(opened, options["source"])
    common = {name: options[name] for name in ("dataset", "data_dir", "samples", "seed")}
    common |= {"runtimes": options["runtimes"] or None, "module": module}
    scope = Scope(
        options["precisions"] or None,
        options["optimisations"] or ("all",),
        (False, True) if options["io_binding"] else (False,),
        options["conv_searches"] or ("heuristic",),
        **{name: options[name] for name in ("max_samples", "thorough", "drift", "allow_low_accuracy")},
    )
    with stages(logged=False) as progress:
        report = verify(opened, **common, scope=scope, progress=progress)
    if not options["with_self_test"]:
        return report
    from bnexport.verification.self_test.tester import self_test

    with counting("self-test") as progress:
        low = scope.allow_low_accuracy
        return report.with_self_test(self_test(opened, **common, allow_low_accuracy=low, progress=progress))


def _write_files(report: VerificationReport, opened: Bundle, path: Path, options: dict[str, Any]) -> None:
    """Write the report's files that the options name."""
    if (target := options["json_file"]) is not None:
        write_json(target, report.to_json())
    if (target := options["junit_file"]) is not None:
        from bnexport.reporting.junit import junit

        write_result(target, junit(report, name=str(path)))
    if (target := options["html_file"]) is not None:
        from bnexport.reporting.html import verification_page

        commands = {"command": _again(path, options), "run_command": _again(path, options, runs=False)}
        write_result(target, verification_page(opened, report, **commands).encode())


#: Options of the written files, and options of each run, which the page adds to the command.
_OF_FILES = ("verbose", "json_file", "junit_file", "html_file")
_OF_RUNS = ("runtimes", "precisions", "optimisations", "io_binding", "conv_searches", "seed", "with_self_test")


def _again(path: Path, options: dict[str, Any], *, runs: bool = True) -> str:
    """Return the command that repeats this verification, for a shell; without ``runs``, without the options of a run."""
    words = ["bnexport", "verify", str(path)]
    for option in click.get_current_context().command.params:
        name = option.name or ""
        if name not in options or name in _OF_FILES or (not runs and name in _OF_RUNS):
            continue
        value = options[name]
        if isinstance(value, bool):
            words += option.opts[:1] if value else option.secondary_opts[:1]
        elif value in (None, (), option.default):
            continue
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [word for item in values for word in (option.opts[0], str(item))]
    return shlex.join(words)
