"""``bnexport fold-and-export``."""

from __future__ import annotations

from pathlib import Path

import click

from bnexport.bundle import STORED_PRECISIONS
from bnexport.cli.dataset_name import DatasetName
from bnexport.exporting.formats import FORMATS
from bnexport.optional import need_packages

_FORMAT = click.Choice([row.name for row in FORMATS])


@click.command("fold-and-export")
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The bundle: models/<name>/<version>.")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Safetensors or a torch state dict, for a network without."
)
@click.option(
    "--model-option", "model_options", multiple=True, metavar="KEY=VALUE", help="For its constructor; repeatable."
)
@click.option(
    "--input", "inputs", multiple=True, metavar="[NAME=]SHAPE[:TYPE]", help="One sample, as 1x28x28; repeatable."
)
@click.option("--dynamic-size", is_flag=True, help="Let height and width of image inputs vary, as the batch does.")
@click.option(
    "--max-growth", type=float, default=1.1, show_default=True, help="How much larger the weights may become by copies."
)
@click.option("--clamps", is_flag=True, help="Fold across ReLU too: a bound per channel instead of a BatchNorm.")
@click.option(
    "--precision", type=click.Choice(tuple(STORED_PRECISIONS)), default="float32", show_default=True,
    help="Of weights and arithmetic in the files; inputs and outputs keep their types.",
)  # fmt: skip
@click.option("--labels", type=click.Path(path_type=Path), help="Text file with one class name per line.")
@click.option("--mean", help="Per channel, as 0.485,0.456,0.406; with it images are accepted by predict.")
@click.option("--std", help="Per channel, as 0.229,0.224,0.225.")
@click.option("--dataset", type=DatasetName(), help="Verify on its test images (a checkpoint names its own).")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of data sets.")
@click.option("--opset", type=int, default=18, show_default=True, help="ONNX operator set.")
@click.option("--ir-version", type=int, help="ONNX file format.  [default: lowest possible, at least 8]")
@click.option("--format", "formats", multiple=True, type=_FORMAT, help="Write only this; repeatable.  [default: all]")
@click.option("--allow-untrained", is_flag=True, help="Accept BatchNorm layers that were never trained.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the fold report and the verdict as JSON.")
def command(source: str, out: Path, weights: Path | None, as_json: bool, **options: object) -> int:
    """Fold BatchNorm, export to ONNX and TorchScript, verify, and write one bundle.

    SOURCE is a run directory or checkpoint of bnexport train, torchvision:NAME or timm:NAME (with --weights), or your own
    network as file.py:factory or package.module:factory (with --weights and --input). The bundle appears whole, after the
    verdict is PASS, or not at all. An ONNX file as SOURCE is folded as it is, into a bundle or into --out FILE.onnx.
    """
    need_packages("bnexport fold-and-export", "torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "jinja2")
    from bnexport.cli.aside import prints_aside
    from bnexport.cli.onnx_source import fold_onnx_source, is_onnx
    from bnexport.cli.options import export_request

    if is_onnx(source):
        return fold_onnx_source(source, out, options, as_json=as_json)
    from bnexport.pipeline import fold_and_export
    from bnexport.reporting.results import print_export

    request = export_request(**options)  # type: ignore[arg-type]
    with prints_aside():
        result = fold_and_export(source, out, weights=weights, request=request)
    print_export(result.fold, result.verification, result.bundle, as_json=as_json)
    return 0 if result.bundle is not None else 1
