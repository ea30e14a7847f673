"""``bnexport audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.auditing.tool_table import TOOLS
from bnexport.cli.options import PATH, given_options, numbers, options_of, read_model_options
from bnexport.errors import UsageError
from bnexport.exporting.export_request import ExportRequest
from bnexport.files import input_errors
from bnexport.optional import need_packages

_NAMES = [tool.name for tool in TOOLS]
_OF_NETWORKS = ("weights", "weights_key", "model_options", "inputs", "tools", "seed")
_OF_INT8 = ("reference", "samples", "mean", "std", "repair", "force")


@click.command("audit", epilog="Example: bnexport audit net.int8.onnx --reference net.onnx --samples photos.npy")
@click.argument("source")
@click.option("--weights", type=PATH, help="Weights file, bundle or run directory with the weights of the network.")
@options_of(ExportRequest, last="inputs")
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
@click.option("--reference", type=PATH, help="Float32 ONNX file of an int8 file. Int8 files only.")
@click.option(
    "--samples",
    type=PATH,
    help="Inputs as .npy or .npz file, or a folder of images with --mean and --std. Int8 files only.",
)
@click.option("--mean", help="Mean per channel of pixels from 0 to 1, as 0.485,0.456,0.406. Int8 files only.")
@click.option("--std", help="Standard deviation per channel, as 0.229,0.224,0.225. Int8 files only.")
@click.option(
    "--repair", type=PATH, metavar="OUT.onnx", help="File to write, with weights that can't saturate. Int8 files only."
)
@click.option("--force", is_flag=True, help="Replace an existing file of --repair.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: str, weights: Path | None, inputs: tuple[str, ...], tools: tuple[str, ...], seed: int, **options: Any
) -> int:
    """Show which tools fold the BatchNorm layers of a network wrongly, or whether an int8 file is computed rightly.

    SOURCE is a source of fold-and-export. Each tool folds the network, and its outputs on random inputs are compared with
    the network in float64. The tools are torch.jit, torch.fx, torch.compile, torch.onnx.export, ONNX Runtime at each
    optimisation level, and bnexport. Exit code 1: a tool is wrong. A tool without an answer, or not installed, is not wrong.

    An ONNX file as SOURCE has to be an int8 file, of any tool. The audit counts the channels whose sums can saturate at 16
    bits, emulates the effect, and compares with ONNX Runtime on this machine. Exit code 1: its default kernels compute
    something else than the file states, or saturation changes labels.
    """
    from bnexport.cli.fold_and_export import is_onnx

    if is_onnx(source):
        for path in filter(None, (Path(source), options["reference"])):
            with input_errors(path, UsageError, remedy="Check the path"):
                if not path.is_file():
                    raise UsageError(f"{path} does not exist, or is not a file", remedy="Check the path")
        _refuse_options(source, _OF_NETWORKS, "takes a network, not an int8 file")
        return _audit_int8(Path(source), **{name: options[name] for name in (*_OF_INT8, "as_json")})
    _refuse_options(source, _OF_INT8, "takes an int8 ONNX file")
    need_packages("bnexport audit", "torch", "onnx", "onnxscript", "onnx_ir")
    from bnexport.auditing.audit import audit
    from bnexport.cli.output import prints_aside
    from bnexport.exporting.export_request import parse_inputs
    from bnexport.loading.sources import load_source
    from bnexport.reporting.results import print_audit

    with prints_aside():
        arguments = read_model_options(options["model_options"])
        loaded = load_source(source, weights=weights, weights_key=options["weights_key"], options=arguments)
        for note in loaded.notes:
            click.echo(note, err=True)
        specs = parse_inputs(inputs, default_shape=loaded.input_shape)
        report = audit(
            loaded.module, specs, tools=tools, seed=seed, progress=lambda tool: click.echo(f"running {tool}", err=True)
        )
    print_audit(report, as_json=options["as_json"])
    return 1 if report.wrong else 0


def _refuse_options(source: str, names: tuple[str, ...], why: str) -> None:
    """Refuse options given on the command line that could only be ignored."""
    for name, flag in given_options().items():
        if name in names:
            raise UsageError(f"{flag} does not go with {source}: it {why}", remedy="Leave it out")


def _audit_int8(source: Path, *, as_json: bool, mean: str | None, std: str | None, **options: Any) -> int:
    need_packages("bnexport audit", "onnx", "onnxruntime")
    from bnexport.auditing.int8_audit import audit_int8_file
    from bnexport.reporting.results import print_int8_audit

    found = audit_int8_file(source, mean=numbers(mean, "--mean"), std=numbers(std, "--std"), **options)
    if options["repair"] is not None:
        click.echo(f"written: {options['repair']}, in which no channel can saturate", err=True)
    print_int8_audit(found, as_json=as_json)
    return 1 if found.wrong else 0
