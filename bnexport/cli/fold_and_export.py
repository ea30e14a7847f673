"""``bnexport fold-and-export``: a network into a bundle, or an ONNX file into a file or a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from bnexport.cli.options import export_request, options_of
from bnexport.errors import UsageError
from bnexport.exporting.request import ExportRequest
from bnexport.optional import need_packages

#: Option of fold-and-export that does not apply to an ONNX file -> reason.
_REFUSED: dict[str, str] = {
    "weights": "an ONNX file has its own weights",
    "weights_key": "an ONNX file has its own weights",
    "model_options": "an ONNX file is built already",
    "dynamic_size": "an ONNX file keeps the sizes that it declares",
    "opset": "an ONNX file keeps its operator set",
    "ir_version": "an ONNX file keeps its IR version",
    "allow_untrained": "an ONNX file is taken as it is",
    "allow_nonfinite": "an ONNX file is taken as it is",
}
#: Options that apply to a bundle only, not to a single file.
_OF_BUNDLES = (
    "labels",
    "rename_classes",
    "mean",
    "std",
    "dataset",
    "data_dir",
    "thorough",
    "formats",
    "allow_low_accuracy",
    "precision",
    "input_type",
)


def is_onnx(source: str) -> bool:
    """Return whether a source is an ONNX file: by its name, or by its first bytes (a protobuf's IR version)."""
    path = Path(source)
    if path.suffix == ".onnx":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start[:1] == b"\x08" and start[8:9] != b"{"  # a safetensors file has its length there, then JSON


def fold_onnx_source(
    source: str, out: Path, options: dict[str, Any], *, as_json: bool, quiet: bool = False, verbose: bool = False
) -> int:
    """Write a file or a bundle, print the fold report, and return the exit code.

    Raises:
        UsageError: An option that does not go with an ONNX file.
    """
    refuse_options(out)
    if out.suffix == ".onnx":
        return _file(source, out, options, as_json=as_json)
    return _bundle(source, out, options, as_json=as_json, quiet=quiet, verbose=verbose)


def refuse_options(out: Path) -> None:
    """Refuse options given on the command line that could only be ignored."""
    context = click.get_current_context()
    words = {option.name: option.opts[0] for option in context.command.params if isinstance(option, click.Option)}
    given = [name for name in words if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    for name in given:
        if name == "precision" and context.params["precision"] not in ("float32", "int8"):
            raise UsageError(
                f"--precision does not apply to {context.params['source']}",
                remedy="Leave it out, or pass int8: an ONNX file keeps its precision otherwise",
            )
        if name in _REFUSED:
            raise UsageError(
                f"{words[name]} does not apply to {context.params['source']}", remedy=f"Leave it out: {_REFUSED[name]}"
            )
        if name in _OF_BUNDLES and out.suffix == ".onnx":
            raise UsageError(f"{words[name]} applies to a bundle only", remedy="Pass --out models/<name>/<version>")
    if set(context.params.get("formats") or ()) - {"onnx"}:
        raise UsageError("an ONNX file can be exported as ONNX only", remedy="Leave --format out")


def _fold_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("max_growth", "clamps") if options.get(name) is not None}


def _file(source: str, out: Path, options: dict[str, Any], *, as_json: bool) -> int:
    from bnexport.onnx_pipeline import fold_onnx_file
    from bnexport.reporting.results import print_json
    from bnexport.reporting.tables import literal, make_console, print_fold_report

    result = fold_onnx_file(
        source, out, force=options["force"], inputs=tuple(options["inputs"] or ()), **_fold_options(options)
    )
    if as_json:
        print_json(
            {
                "file": str(out),
                "changed": result.changed,
                "normalised": list(result.normalised),
                "fold": result.report.to_json(),
            }
        )
        return 0
    console = make_console()
    print_fold_report(result.report, console)
    if result.normalised:
        console.print(literal(f"Normalised before folding: {'; '.join(result.normalised)}.", console), soft_wrap=True)
    if not result.changed:
        text = "Nothing was folded." if result.normalised else "Nothing was changed: the file is written as it was."
        console.print(literal(text, console), soft_wrap=True)
    size = out.stat().st_size
    console.print(literal(f"File: {out} ({size / 1000:.0f} kB)", console), soft_wrap=True)
    return 0


def _bundle(source: str, out: Path, options: dict[str, Any], *, as_json: bool, quiet: bool, verbose: bool) -> int:
    from bnexport.cli.output import stages
    from bnexport.onnx_pipeline import fold_and_export_onnx
    from bnexport.reporting.results import print_export

    request = export_request(**options)
    with stages(quiet=quiet) as progress:
        result = fold_and_export_onnx(source, out, request=request, progress=progress)
    print_export(result.fold, result.verification, result.bundle, as_json=as_json, verbose=verbose)
    return 0 if result.bundle is not None else 1


@click.command("fold-and-export", epilog="Example: bnexport fold-and-export runs/bn_lenet --out models/bn_lenet/1")
@click.argument("source")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Bundle to write: models/<name>/<version>, or FILE.onnx for an ONNX file.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Weights file, bundle or run directory with the weights of the network.",
)
@options_of(ExportRequest, last="rename_classes")
@click.option(
    "--mean", help="Mean per channel of pixels from 0 to 1, as 0.485,0.456,0.406. predict and serve then accept images."
)
@click.option("--std", help="Standard deviation per channel, as 0.229,0.224,0.225.")
@options_of(ExportRequest, first="dataset")
@click.option("--quiet", is_flag=True, help="Print no progress.")
@click.option("--verbose", is_flag=True, help="Print the whole reason for every runtime that was not run.")
@click.option("--json", "as_json", is_flag=True, help="Print the fold report and the verdict as JSON.")
def command(
    source: str, out: Path, weights: Path | None, quiet: bool, verbose: bool, as_json: bool, **options: Any
) -> int:
    """Fold BatchNorm, export to ONNX and TorchScript, verify, and write one bundle.

    SOURCE is a run directory or checkpoint of bnexport train, torchvision:NAME or timm:NAME (with --weights), or your own
    network as file.py:factory or package.module:factory (with --weights and --input). The bundle is written only if the
    verdict is PASS. An ONNX file as SOURCE is folded as it is, into a bundle or into --out FILE.onnx.

    Exit codes: 0 the bundle is written, 1 the verdict is FAIL, 2 bad input, 3 this machine can't run it.
    """
    need_packages("bnexport fold-and-export", "torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "jinja2")
    from bnexport.cli.output import prints_aside, stages

    if is_onnx(source):
        return fold_onnx_source(source, out, options, as_json=as_json, quiet=quiet, verbose=verbose)
    from bnexport.pipeline import fold_and_export
    from bnexport.reporting.results import print_export

    request = export_request(**options)
    with stages(quiet=quiet) as progress, prints_aside():
        result = fold_and_export(source, out, weights=weights, request=request, progress=progress)
    print_export(result.fold, result.verification, result.bundle, as_json=as_json, verbose=verbose)
    return 0 if result.bundle is not None else 1
