"""``bnexport doctor``: what runs on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from bnexport.runtimes.catalogue import RUNNERS

if TYPE_CHECKING:
    from bnexport.runtimes.doctor import Diagnosis


@click.command(name="doctor", epilog="Example: bnexport doctor --require onnxruntime-cuda")
@click.option(
    "--require",
    multiple=True,
    type=click.Choice([spec.name for spec in RUNNERS]),
    metavar="NAME",
    help="Exit with 3 unless this runtime works. Repeatable.  [default: all CPU runtimes of this installation]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(ctx: click.Context, require: tuple[str, ...], as_json: bool) -> None:
    """Run a small model on every runtime, and report missing packages and CUDA packages that do not fit together.

    Exit codes: 0 if the runtimes of --require work (default: all CPU runtimes; in bnexport-runtime ONNX Runtime), else 3.
    """
    from bnexport.runtimes.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        click.echo(json.dumps(diagnosis.to_json(), indent=1, allow_nan=False))
    else:
        _print(diagnosis)
    ctx.exit(3 if diagnosis.broken(require) else 0)


def _print(diagnosis: Diagnosis) -> None:
    from bnexport.reporting.tables import make_console, print_environment

    width = max(len(health.runtime) for health in diagnosis.runtimes)
    for health in diagnosis.runtimes:
        if health.works:
            ran = f"{health.details['engine']} {health.details['version']} on {health.device}"
            click.echo(f"{health.runtime:{width}}  works    {ran}, error {health.error:.1e} of scale")
        else:
            click.echo(f"{health.runtime:{width}}  missing  {health.reason}")
            click.echo(f"{'':{width}}           {health.remedy}")
    for conflict in diagnosis.conflicts:
        click.echo(f"{'CUDA packages':{width}}  conflict {conflict.reason}")
        click.echo(f"{'':{width}}           {conflict.remedy}")
    print_environment(diagnosis.environment, make_console())
