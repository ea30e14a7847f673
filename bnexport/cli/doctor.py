"""``bnexport doctor``: the runtimes that work on this machine."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

import click

from bnexport.cli.options import RUNTIME

if TYPE_CHECKING:
    from bnexport.runtimes.doctor import Diagnosis


@click.command(name="doctor", epilog="Example: bnexport doctor --require onnxruntime-cuda")
@click.option(
    "--require",
    multiple=True,
    type=RUNTIME,
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
    """Print a summary, one line per runtime, then each cause of a missing runtime with its remedy."""
    from bnexport.reporting.tables import cause_of, make_console, print_environment

    console = make_console()
    works = [health for health in diagnosis.runtimes if health.works]
    click.echo(f"{len(works)} of {len(diagnosis.runtimes)} runtimes work on this machine.")
    width = max(len(health.runtime) for health in diagnosis.runtimes)
    causes: dict[tuple[str, str], list[str]] = {}
    for health in diagnosis.runtimes:
        result = "works  " if health.works else "missing"
        text = cause_of(health.reason)
        if health.works:
            text = (
                f"{health.details['engine']} {health.details['version']} on {health.device}, error {health.error:.1e}"
            )
        else:
            causes.setdefault((health.reason, health.remedy), []).append(health.runtime)
        line = f"{health.runtime:{width}}  {result}  {text}"
        click.echo(line if len(line) <= console.width else f"{line[: console.width - 4]} ...")
    click.echo("error: largest |difference| / largest |output|, compared with numpy")
    for (reason, remedy), names in causes.items():
        _explain(", ".join(names), reason, remedy, console.width)
    for conflict in diagnosis.conflicts:
        _explain("CUDA packages that do not fit together", conflict.reason, conflict.remedy, console.width)
    print_environment(diagnosis.environment, console)


def _explain(what: str, reason: str, remedy: str, width: int) -> None:
    click.echo()
    for text in (f"{what}: {reason}", f"  To do: {remedy}"):
        click.echo(textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False))
