"""``bnexport audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.auditing.tool_table import TOOLS
from bnexport.optional import need_packages

_NAMES = [tool.name for tool in TOOLS]


@click.command("audit", epilog="Example: bnexport audit torchvision:resnet18 --weights resnet18.pth")
@click.argument("source")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Weights file, bundle or run directory with the weights of the network.",
)
@click.option("--weights-key", metavar="NAME", help="Name of the set of weights, if the file has several.")
@click.option(
    "--model-option",
    "model_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Argument of the network's constructor. Repeatable.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]SHAPE[:TYPE]",
    help="Shape of one sample, as 1x28x28. Repeatable.",
)
@click.option(
    "--tool",
    "tools",
    multiple=True,
    type=click.Choice(_NAMES),
    metavar="NAME",
    help=f"Audit only this tool. Repeatable. Tools: {', '.join(_NAMES)}.  [default: all]",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed of the inputs."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: str, weights: Path | None, inputs: tuple[str, ...], tools: tuple[str, ...], seed: int, **options: Any
) -> int:
    """Show which tools fold the BatchNorm layers of a network wrongly.

    SOURCE is a source of fold-and-export. Each tool folds the network, and its outputs on random inputs are compared with
    the network in float64. The tools are torch.jit, torch.fx, torch.compile, torch.onnx.export, ONNX Runtime at each
    optimisation level, and bnexport. Exit code 1: a tool is wrong. A tool without an answer, or not installed, is not wrong.
    """
    need_packages("bnexport audit", "torch", "onnx", "onnxscript", "onnx_ir")
    from bnexport.auditing.audit import audit
    from bnexport.cli.options import read_model_options
    from bnexport.cli.output import prints_aside
    from bnexport.exporting.request import parse_inputs
    from bnexport.loading.sources import load_source
    from bnexport.reporting.results import print_audit

    with prints_aside():
        given = read_model_options(options["model_options"])
        loaded = load_source(source, weights=weights, weights_key=options["weights_key"], options=given)
        for note in loaded.notes:
            click.echo(note, err=True)
        specs = parse_inputs(inputs, default_shape=loaded.input_shape)
        report = audit(loaded.module, specs, tools=tools, seed=seed, progress=_show)
    print_audit(report, as_json=options["as_json"])
    return 1 if report.wrong else 0


def _show(tool: str) -> None:
    """Print progress on standard error, so that standard output has only the table or JSON."""
    click.echo(f"running {tool}", err=True)
