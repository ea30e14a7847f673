"""``bnexport recalibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.cli.options import options_of, values_of
from bnexport.evaluating.network_options import RecalibrationRequest
from bnexport.optional import need_packages


@click.command("recalibrate")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: *.recalibrated.safetensors]")
@options_of(RecalibrationRequest, first="definition")
@options_of(RecalibrationRequest, last="labels")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(checkpoint: Path, out: Path | None, as_json: bool, **options: Any) -> None:
    """Re-estimate the moving statistics of every BatchNorm exactly, over training images, into a new checkpoint.

    CHECKPOINT is a run directory or checkpoint, or with --source any weights file; it stays as it is. Shows how far the old
    statistics were, layer by layer, and the accuracy on the test images before and after.
    """
    need_packages("bnexport recalibrate", "torch", "safetensors")
    from bnexport.cli.output import prints_aside, progress_bar
    from bnexport.evaluating.recalibration import recalibrate_checkpoint
    from bnexport.reporting.results import print_recalibration

    request = RecalibrationRequest(**values_of(RecalibrationRequest, options))
    with prints_aside(), progress_bar("re-estimating") as advance:
        done = recalibrate_checkpoint(checkpoint, out, request, on_batch=advance)
    print_recalibration(done, as_json=as_json)
