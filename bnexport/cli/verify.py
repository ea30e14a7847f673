"""``bnexport verify``: one bundle in, PASS or FAIL out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bnexport.runtimes.catalogue import RUNNERS

if TYPE_CHECKING:
    from torch import nn

    from bnexport.bundle import Bundle

_STDOUT = "-"


@click.command(name="verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice([spec.name for spec in RUNNERS]),
    help="Verify on this runtime; may be given again. Default: all that work here.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where the data set's files lie. Nothing is downloaded. Default: BNEXPORT_DATA, then the cache.",
)
@click.option(
    "--source",
    metavar="FILE.py:FACTORY",
    help="The code of the original network, for a bundle of your own model. Its weights come from the bundle.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the report as JSON; - prints it instead of the table.")
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    runtimes: tuple[str, ...],
    data_dir: Path | None,
    source: str | None,
    json_file: str | None,
) -> None:
    """Prove that BUNDLE computes what its network computes: exit 0 for PASS, 1 for FAIL.

    Checks every file's hash, replays the golden vectors, proves the written file in float64, and compares each
    runtime in strict float32 on real test images and synthetic inputs.
    """
    from bnexport.bundle import Bundle
    from bnexport.cli.options import prints_aside
    from bnexport.reporting.tables import make_console, print_environment, print_verification
    from bnexport.verification.verify import verify

    opened = Bundle.open(bundle)
    with prints_aside():
        module = _module(source, opened) if source else None
        report = verify(opened, runtimes=runtimes or None, data_dir=data_dir, module=module)
    if json_file is not None:
        _write(json_file, json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
    if json_file != _STDOUT:
        console = make_console()
        print_verification(report, console)
        print_environment(report.environment, console)
    ctx.exit(0 if report.passed else 1)


def _module(source: str, bundle: Bundle) -> nn.Module:
    """The original network with the bundle's own options and unfolded weights."""
    from bnexport.bundle import WEIGHTS
    from bnexport.nn.loading import load_source

    network = bundle.manifest.network
    same = (
        str(network.get("source")).rpartition(":")[2] == source.rpartition(":")[2]
    )  # the file may lie elsewhere by now
    options = network.get("options") if same else None
    return load_source(source, weights=bundle.file(WEIGHTS), options=options).module


def _write(target: str, text: str) -> None:
    from bnexport.files import forget_reader, write_atomically

    if target == _STDOUT:
        try:
            click.echo(text, nl=False)
        except BrokenPipeError:  # the exit code still has to tell the verdict
            forget_reader()
    else:
        write_atomically(Path(target), text.encode())
