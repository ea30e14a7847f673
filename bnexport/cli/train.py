"""``bnexport train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.cli.options import PATH, config_option, options_of, values_of, was_given
from bnexport.optional import need_packages
from bnexport.training.config import LENET, TrainingConfig


@click.command(
    "train",
    context_settings={"show_default": True},
    epilog="Example: bnexport train --epochs 10 --lr 1.0 --out runs/bn_lenet",
)
@config_option("train")
@options_of(TrainingConfig, last="dataset")
@click.option("--data-dir", type=PATH, metavar="DIR", help="Folder of data sets: it contains FashionMNIST/raw.")
@options_of(TrainingConfig, first="model")
@click.option("--out", type=PATH, default=Path("runs/bn_lenet"), help="Run directory to write.")
@click.option("--tensorboard", type=PATH, metavar="DIR", help="Folder for TensorBoard event files.")
@click.option(
    "--resume", is_flag=True, help="Resume after the last finished epoch, with the options of the stopped run."
)
@click.option("--force", is_flag=True, help="Replace an existing run.")
@click.pass_context
def command(context: click.Context, /, out: Path, resume: bool, tensorboard: Path | None, **options: Any) -> None:
    """Train a classifier, by default BN-LeNet with the settings of "Dive into Deep Learning", section 8.5.

    Several processes: torchrun --nproc-per-node N -m bnexport train ...
    """
    need_packages("bnexport train", "torch", "safetensors", "matplotlib", "filelock")
    from bnexport.cli.training_display import TrainingDisplay, leading, quiet_followers
    from bnexport.reporting.figures import learning_curves
    from bnexport.training.directory import CURVES
    from bnexport.training.listeners import Both, EventFiles
    from bnexport.training.step import keep_freed_memory
    from bnexport.training.training_run import train

    data_dir, force = options.pop("data_dir"), options.pop("force")
    keep_freed_memory()
    with quiet_followers(), TrainingDisplay() as display:
        config = _config(context, out, resume, options)
        listener = display if tensorboard is None or not leading() else Both(display, EventFiles(tensorboard))
        result = train(config, out=out, resume=resume, force=force, data_dir=data_dir, progress=listener)
        if leading():
            name = f"BN-LeNet ({config.norm})" if config.model == LENET else config.model
            learning_curves(result.history, out / CURVES, title=f"{name} on {config.dataset}")
            display.show_result(result, written=(result.model, result.checkpoint, out / CURVES))


def _config(context: click.Context, out: Path, resume: bool, options: dict[str, Any]) -> TrainingConfig:
    """Return the training's configuration; for a resumed run, the stored one with the options given now."""
    from bnexport.training.directory import RunDirectory

    values = values_of(TrainingConfig, options)
    if not resume:
        return TrainingConfig(**values)
    given = {name: value for name, value in values.items() if was_given(context, name)}
    return RunDirectory(out).config_to_resume(given)
