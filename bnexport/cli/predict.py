"""``bnexport predict``."""

from __future__ import annotations

from pathlib import Path

import click

from bnexport.runtimes.catalogue import RUNNERS

_RUNTIME = click.Choice([spec.name for spec in RUNNERS])


@click.command("predict")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--runtime", type=_RUNTIME, default="onnxruntime-cpu", show_default=True, help="Engine and device.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per image, one per line.")
def command(bundle: Path, images: tuple[Path, ...], runtime: str, as_json: bool) -> None:
    """Label IMAGES (PNG, JPEG, BMP, WebP, GIF, .npy, IDX) with BUNDLE's own preprocessing: label and probability per image."""
    from bnexport.reporting.results import print_predictions
    from bnexport.serving.predictor import predict_images

    print_predictions(predict_images(bundle, *images, runtime=runtime), as_json=as_json)
