"""``bnexport recalibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.cli.options import DatasetName
from bnexport.evaluating.request import DEFINITIONS, RecalibrationRequest
from bnexport.optional import need_packages
from bnexport.training.config import DEVICES

_DEFAULT = RecalibrationRequest()


@click.command("recalibrate", context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="[default: *.recalibrated.safetensors]")
@click.option(
    "--definition",
    type=click.Choice(tuple(DEFINITIONS)),
    default=_DEFAULT.definition,
    help="; ".join(f"{name}: {meaning}" for name, meaning in DEFINITIONS.items()) + ".",
)
@click.option("--dataset", type=DatasetName(), help="Whose images.  [default: CHECKPOINT's own]")
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder of data sets.")
@click.option("--samples", type=int, metavar="N", help="Training images, chosen at random.  [default: all]")
@click.option("--batch-size", type=int, default=_DEFAULT.batch_size, help="Images at once, at most.")
@click.option("--seed", type=click.IntRange(min=0), default=_DEFAULT.seed, help="Of the choice and order of images.")
@click.option("--device", type=click.Choice(DEVICES), default=_DEFAULT.device, help="auto takes a GPU if there is one.")
@click.option("--source", metavar="FILE.py:FACTORY", help="The code of your own network; CHECKPOINT holds its weights.")
@click.option("--weights-key", metavar="NAME", help="With --source: weights to take, of a file with several sets.")
@click.option("--force", is_flag=True, help="Replace the output.")
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

    with prints_aside(), progress_bar("re-estimating") as advance:
        done = recalibrate_checkpoint(checkpoint, out, RecalibrationRequest(**options), on_batch=advance)
    print_recalibration(done, as_json=as_json)
