"""``bnexport audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from bnexport.auditing.tool_table import TOOLS
from bnexport.errors import BnexportError, DataError, ModelError, RuntimeUnavailable, UsageError
from bnexport.optional import need_packages

_NAMES = [tool.name for tool in TOOLS]
_OF_NETWORKS = ("weights", "weights_key", "model_options", "inputs", "tools", "seed")
_OF_INT8 = ("reference", "samples", "mean", "std", "repair", "force")
#: Kernels of ONNX Runtime in the table -> whether all of them add in 32 bits (session.x64quantprecision).
_KERNELS = {"default kernels here": False, "precise kernels here": True}


@click.command("audit", epilog="Example: bnexport audit net.int8.onnx --reference net.onnx --samples photos.npy")
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
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Float32 ONNX file of an int8 file. Int8 files only."
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Inputs as .npy or .npz file, or a folder of images with --mean and --std. Int8 files only.",
)
@click.option("--mean", help="Mean per channel of pixels from 0 to 1, as 0.485,0.456,0.406. Int8 files only.")
@click.option("--std", help="Standard deviation per channel, as 0.229,0.224,0.225. Int8 files only.")
@click.option(
    "--repair",
    type=click.Path(path_type=Path),
    metavar="OUT.onnx",
    help="File to write, with weights that can't saturate. Int8 files only.",
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
        _refuse_options(source, _OF_NETWORKS, "takes a network, not an int8 file")
        return _audit_int8(Path(source), **options)
    _refuse_options(source, _OF_INT8, "takes an int8 ONNX file")
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


def _refuse_options(source: str, names: tuple[str, ...], why: str) -> None:
    """Refuse options given on the command line that could only be ignored."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name in names:
            raise UsageError(f"{option.opts[0]} does not go with {source}: it {why}", remedy="Leave it out")


def _audit_int8(
    source: Path, *, reference: Path | None, samples: Path | None, repair: Path | None, force: bool, as_json: bool,
    **options: Any,
) -> int:  # fmt: skip
    need_packages("bnexport audit", "onnx", "onnxruntime")
    from bnexport.files import refuse_existing_file, write_atomically
    from bnexport.onnx_files.models import read_model
    from bnexport.quantization.int8_audit import audit_int8, is_int8_model
    from bnexport.quantization.writer import repaired
    from bnexport.reporting.results import print_int8_audit

    if repair is not None:
        refuse_existing_file(repair, force=force, read=[source], role="audited file")
    model = read_model(source)
    if not is_int8_model(model):
        raise ModelError(
            f"{source} is not an int8 file: it has no QuantizeLinear, QLinearConv or ConvInteger",
            remedy="Give an int8 file, or the network itself to compare tools that fold",
        )
    feeds, described = (None, "") if samples is None else _samples(model, samples, options["mean"], options["std"])
    exact = None if reference is None else read_model(reference)
    runs, unavailable = {}, ""
    try:
        runs = {name: _kernels(source, precise=precise) for name, precise in _KERNELS.items()}
    except RuntimeUnavailable as error:
        unavailable = error.message
    found = audit_int8(model, runs, feeds, described=described, reference=exact, unavailable=unavailable)
    if repair is not None:
        written = repaired(model, found.means)
        write_atomically(repair, written.SerializeToString(deterministic=True))
        click.echo(f"written: {repair}, in which no channel can saturate", err=True)
    print_int8_audit(found, as_json=as_json)
    return 1 if found.wrong else 0


def _samples(model: Any, path: Path, mean: str | None, std: str | None) -> tuple[Any, str]:
    """Return the inputs of --samples, and what they are; a fixed batch size is left to the audit."""
    from dataclasses import replace

    from bnexport.cli.options import numbers
    from bnexport.data.preprocessing import PixelPreprocessing, Preprocessing
    from bnexport.errors import ExportError
    from bnexport.exporting.request import InputSpec, image_preprocessing
    from bnexport.onnx_pipeline import signature_of_file
    from bnexport.verification.samples import load_samples

    try:
        declared = signature_of_file(model)
    except ExportError as error:
        raise ModelError(str(error.message), remedy="Give a file in float32 that declares its shapes") from error
    inputs = tuple(replace(spec, shape=("batch", *spec.shape[1:])) for spec in declared.inputs)
    means, stds = (None if text is None else numbers(text, flag) for text, flag in ((mean, "--mean"), (std, "--std")))
    sized = all(isinstance(size, int) for size in inputs[0].shape[1:])
    specs = [InputSpec(spec.name, tuple(map(int, spec.shape[1:]))) for spec in inputs] if sized else []
    image = image_preprocessing(specs, means, stds)
    if image is None and path.is_dir():
        raise UsageError(f"--samples {path} is a folder of images", remedy="Pass --mean and --std as well")
    kind = PixelPreprocessing if inputs[0].dtype == "uint8" else Preprocessing
    given = None if image is None else kind.from_json(image)
    found = load_samples(path, replace(declared, inputs=inputs), given, limit=256)
    return found.feeds, path.name


def _kernels(source: Path, *, precise: bool) -> Any:
    """Return a function that runs the file in ONNX Runtime: inputs -> outputs by name."""
    from bnexport.onnx_files.models import read_screened
    from bnexport.optional import one_line
    from bnexport.runtimes.base import RunSettings
    from bnexport.runtimes.onnxruntime_session import load_engine, open_session

    try:
        session = open_session(load_engine(), read_screened(source), "cpu", RunSettings(precise=precise))
    except BnexportError:
        raise
    except Exception as error:  # onnxruntime's classes derive from Exception alone
        raise RuntimeUnavailable(
            f"ONNX Runtime can't load the file: {one_line(error, 120)}", remedy="Check the file with onnx.checker"
        ) from error
    names = [item.name for item in session.get_outputs()]

    def run(feeds: Any) -> dict[str, Any]:
        try:
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # as above
            raise DataError(
                f"onnxruntime can't run {source} on these samples: {one_line(error, 160)}",
                remedy="Give samples of the shape that the file declares",
            ) from error

    return run
