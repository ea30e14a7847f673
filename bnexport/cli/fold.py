"""``bnexport fold``: the folded weights of a network as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.cli.fold_and_export import is_onnx
from bnexport.cli.options import options_of, values_of
from bnexport.cli.output import prints_aside
from bnexport.errors import UsageError
from bnexport.exporting.request import ExportRequest
from bnexport.optional import need_packages


@click.command(
    "fold", epilog="Example: bnexport fold torchvision:resnet18 --weights resnet18.pth --out folded.safetensors"
)
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Safetensors file to write.")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Weights of the network: safetensors or a torch state dict."
)
@options_of(ExportRequest, last="inputs")
@options_of(ExportRequest, first="allow_untrained", last="allow_untrained")
@options_of(ExportRequest, first="allow_nonfinite", last="allow_nonfinite")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the fold report as JSON.")
def command(source: str, out: Path, weights: Path | None, as_json: bool, **options: Any) -> int:
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
