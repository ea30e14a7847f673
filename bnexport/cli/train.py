"""``bnexport train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.data.catalogue import DATASETS
from bnexport.nn.lenet import NORMS
from bnexport.optional import need_packages
from bnexport.training.config import DEVICES, TrainingConfig

_DEFAULT = TrainingConfig()


@click.command("train", context_settings={"show_default": True})
@click.option("--dataset", type=click.Choice(tuple(DATASETS)), default=_DEFAULT.dataset, help="What to train on.")
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder that holds FashionMNIST/raw.")
@click.option("--norm", type=click.Choice(NORMS), default=_DEFAULT.norm, help="Kind of BatchNorm.")
@click.option("--epochs", type=int, default=_DEFAULT.epochs, help="Passes over the training set.")
@click.option("--lr", type=float, default=_DEFAULT.lr, help="Learning rate of SGD.")
@click.option("--batch-size", type=int, default=_DEFAULT.batch_size, help="Images per step.")
@click.option("--device", type=click.Choice(DEVICES), default=_DEFAULT.device, help="auto takes a GPU if there is one.")
@click.option("--seed", type=int, default=_DEFAULT.seed, help="Of the weights and the order of the images.")
@click.option(
    "--recalibrate/--no-recalibrate",
    default=_DEFAULT.recalibrate,
    help="Re-estimate the moving statistics over the training set at the end.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bn_lenet"), help="Run directory.")
@click.option("--resume", is_flag=True, help="Go on from the last whole epoch; options not given are the run's own.")
@click.option("--force", is_flag=True, help="Replace a run that is there.")
@click.pass_context
def command(
    context: click.Context, /, data_dir: Path | None, out: Path, resume: bool, force: bool, **options: Any
) -> None:
    """Train BN-LeNet; the defaults are those of "Dive into Deep Learning", section 8.5."""
    need_packages("bnexport train", "torch", "safetensors", "matplotlib")
    from bnexport.cli.training_display import TrainingDisplay
    from bnexport.reporting.figures import learning_curves
    from bnexport.training.directory import CURVES, RunDirectory
    from bnexport.training.run import train

    given = {name: value for name, value in options.items() if _was_given(context, name)}
    config = RunDirectory(out).config_to_resume(given) if resume else TrainingConfig(**options)
    with TrainingDisplay() as display:
        result = train(config, out=out, resume=resume, force=force, data_dir=data_dir, progress=display)
        learning_curves(result.history, out / CURVES, title=f"BN-LeNet ({config.norm}) on {config.dataset}")
        display.show_result(result, written=(result.model, result.checkpoint, out / CURVES))


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
