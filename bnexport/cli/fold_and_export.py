"""``bnexport fold-and-export``: a network or an ONNX file into a bundle; ``bnexport fold``: its folded weights as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.cli.options import PATH, export_request, given_options, options_of, values_of
from bnexport.cli.output import prints_aside, stages
from bnexport.errors import UsageError
from bnexport.exporting.export_request import ExportRequest
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
    "pack_pools",
)


def is_onnx(source: str) -> bool:
    """Return True if a source is an ONNX file: by its name, or by its first bytes (a protobuf's IR version)."""
    path = Path(source)
    if path.suffix == ".onnx":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start[:1] == b"\x08" and start[8:9] != b"{"  # a safetensors file has its length there, then JSON


def _refuse_options(out: Path) -> None:
    """Refuse options given for an ONNX file that could only be ignored."""
    given = click.get_current_context().params
    for name, flag in given_options().items():
        if name == "precision" and given["precision"] not in ("float32", "int8"):
            raise UsageError(
                f"--precision does not apply to {given['source']}",
                remedy="Leave it out, or pass int8: an ONNX file keeps its precision otherwise",
            )
        if name in _REFUSED:
            raise UsageError(f"{flag} does not apply to {given['source']}", remedy=f"Leave it out: {_REFUSED[name]}")
        if name in _OF_BUNDLES and out.suffix == ".onnx":
            raise UsageError(f"{flag} applies to a bundle only", remedy="Pass --out models/<name>/<version>")
    if set(given["formats"]) - {"onnx"}:
        raise UsageError("an ONNX file can be exported as ONNX only", remedy="Leave --format out")


def _fold_file(source: str, out: Path, options: dict[str, Any], *, as_json: bool) -> int:
    """Fold an ONNX file into an ONNX file."""
    from bnexport.onnx_pipeline import fold_onnx_file
    from bnexport.reporting.results import print_fold, print_json

    chosen = {name: options[name] for name in ("force", "inputs", "max_growth", "clamps")}
    result = fold_onnx_file(source, out, **chosen)
    before = list(result.normalised)
    if as_json:
        print_json({"file": str(out), "changed": result.changed, "normalised": before, "fold": result.report.to_json()})
        return 0
    notes = [f"Normalised before folding: {'; '.join(before)}."] if before else []
    if not result.changed:
        notes.append("Nothing was folded." if before else "Nothing was changed: the file is written as it was.")
    print_fold(result.report, out, *notes)
    return 0


@click.command("fold-and-export", epilog="Example: bnexport fold-and-export runs/bn_lenet --out models/bn_lenet/1")
@click.argument("source")
@click.option(
    "--out", required=True, type=PATH, help="Bundle to write: models/<name>/<version>, or FILE.onnx for an ONNX file."
)
@click.option("--weights", type=PATH, help="Weights file, bundle or run directory with the weights of the network.")
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
    onnx = is_onnx(source)
    if onnx:
        _refuse_options(out)
        if out.suffix == ".onnx":
            return _fold_file(source, out, options, as_json=as_json)
    from bnexport.pipeline import fold_and_export
    from bnexport.reporting.results import print_export

    request = export_request(**options)
    with stages(quiet=quiet) as progress, prints_aside():
        if onnx:
            from bnexport.onnx_pipeline import fold_and_export_onnx

            result = fold_and_export_onnx(source, out, request=request, progress=progress)
        else:
            result = fold_and_export(source, out, weights=weights, request=request, progress=progress)
    print_export(result.fold, result.verification, result.bundle, as_json=as_json, verbose=verbose)
    return 0 if result.bundle is not None else 1


@click.command(
    "fold", epilog="Example: bnexport fold torchvision:resnet18 --weights resnet18.pth --out folded.safetensors"
)
@click.argument("source")
@click.option("--out", required=True, type=PATH, help="Safetensors file to write.")
@click.option("--weights", type=PATH, help="Weights of the network: safetensors or a torch state dict.")
@options_of(ExportRequest, last="inputs")
@options_of(ExportRequest, first="allow_untrained", last="allow_untrained")
@options_of(ExportRequest, first="allow_nonfinite", last="allow_nonfinite")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the fold report as JSON.")
def fold(source: str, out: Path, weights: Path | None, as_json: bool, **options: Any) -> int:
    """Fold BatchNorm inside a network and write the folded weights, under the network's own names.

    SOURCE is a source of fold-and-export, except an ONNX file. The fold is proved on the network itself in float64. The
    file appears whole or not at all. bnexport.load_folded loads it into a network.

    Exit codes: 0 done, 1 the proof failed, 2 bad input.
    """
    need_packages("bnexport fold", "torch", "safetensors")
    from bnexport.pipeline import fold_weights
    from bnexport.reporting.results import print_fold, print_json

    if is_onnx(source):
        raise UsageError(
            f"{source} is an ONNX file, which has no modules",
            remedy=f"Fold it with bnexport fold-and-export {source} --out FILE.onnx",
        )
    request = ExportRequest(**values_of(ExportRequest, options))
    with prints_aside():
        result = fold_weights(source, out, weights=weights, request=request)
    if as_json:
        print_json({"file": str(out), "fold": result.report.to_json()})
        return 0
    unchanged = () if result.report.folded else ("Nothing was folded: the file holds the weights as they were.",)
    print_fold(result.report, out, *unchanged)
    return 0
