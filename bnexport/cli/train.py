"""``bnexport train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnexport.cli.config_file import config_option, was_given
from bnexport.cli.options import DatasetName
from bnexport.nn.lenet import NORMS
from bnexport.optional import need_packages
from bnexport.training.config import AMP, DEVICES, OPTIMIZERS, SCHEDULES, TrainingConfig

if TYPE_CHECKING:
    from bnexport.training.progress import Progress

_DEFAULT = TrainingConfig()


@click.command("train", context_settings={"show_default": True})
@config_option("train")
@click.option(
    "--dataset",
    type=DatasetName(),
    default=_DEFAULT.dataset,
    help="What to train on; a folder has train/CLASS/*.png and val/CLASS/*.png.",
)
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder that holds FashionMNIST/raw.")
@click.option(
    "--model",
    default=_DEFAULT.model,
    metavar="SOURCE",
    help="bn_lenet, torchvision:NAME, timm:NAME, or file.py:factory of your own.",
)
@click.option("--model-option", "model_options", multiple=True, metavar="KEY=VALUE", help="Of the model's constructor.")
@click.option(
    "--input", default="", metavar="CxHxW", show_default="the images' own", help="Shape of an image for the model."
)
@click.option("--mean", metavar="M,M,M", show_default="0", help="Subtracted from pixels of 0 to 1, per channel.")
@click.option("--std", metavar="S,S,S", show_default="1", help="Divided by, per channel.")
@click.option("--norm", type=click.Choice(NORMS), default=_DEFAULT.norm, help="Kind of BatchNorm of bn_lenet.")
@click.option("--epochs", type=int, default=_DEFAULT.epochs, help="Passes over the training set.")
@click.option("--lr", type=float, default=_DEFAULT.lr, help="Learning rate; the largest of a schedule.")
@click.option("--batch-size", type=int, default=_DEFAULT.batch_size, help="Images per step, of all processes together.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default=_DEFAULT.optimizer, help="How weights move.")
@click.option("--momentum", type=float, default=_DEFAULT.momentum, help="Of SGD.")
@click.option("--weight-decay", type=float, default=_DEFAULT.weight_decay, help="Not on biases, gamma and beta.")
@click.option("--schedule", type=click.Choice(SCHEDULES), default=_DEFAULT.schedule, help="Of the learning rate.")
@click.option("--warmup-epochs", type=float, default=_DEFAULT.warmup_epochs, help="The learning rate grows first.")
@click.option("--label-smoothing", type=float, default=_DEFAULT.label_smoothing, help="Share of every class alike.")
@click.option("--amp", type=click.Choice(AMP), default=_DEFAULT.amp, help="Automatic mixed precision.")
@click.option(
    "--cuda-graph/--no-cuda-graph",
    default=None,
    show_default="records bn_lenet and the networks of torchvision and timm",
    help="Record the training step as a CUDA graph on a GPU, or take every step plainly. "
    "A network whose Python code changes something in a step is not recorded, and a note says so.",
)
@click.option("--sync-batch-norm", is_flag=True, help="Statistics over all processes (torchrun).")
@click.option("--device", type=click.Choice(DEVICES), default=_DEFAULT.device, help="auto takes a GPU if there is one.")
@click.option("--seed", type=int, default=_DEFAULT.seed, help="Of the weights, the order of the images, and dropout.")
@click.option(
    "--recalibrate/--no-recalibrate",
    default=_DEFAULT.recalibrate,
    help="Re-estimate the moving statistics over the training set at the end.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bn_lenet"), help="Run directory.")
@click.option("--tensorboard", type=click.Path(path_type=Path), metavar="DIR", help="Write TensorBoard event files.")
@click.option("--resume", is_flag=True, help="Go on from the last whole epoch; options not given are the run's own.")
@click.option("--force", is_flag=True, help="Replace a run that is there.")
@click.pass_context
def command(context: click.Context, /, out: Path, resume: bool, tensorboard: Path | None, **options: Any) -> None:
    """Train a classifier, BN-LeNet by default; the defaults are those of "Dive into Deep Learning", section 8.5.

    Several processes: torchrun --nproc-per-node N -m bnexport train ...
    """
    need_packages("bnexport train", "torch", "safetensors", "matplotlib", "filelock")
    from bnexport.cli.training_display import TrainingDisplay, leading, quiet_followers
    from bnexport.reporting.figures import learning_curves
    from bnexport.training.cpu_kernels import keep_freed_memory
    from bnexport.training.directory import CURVES
    from bnexport.training.run import train

    data_dir, force = options.pop("data_dir"), options.pop("force")
    keep_freed_memory()
    with quiet_followers(), TrainingDisplay() as display:
        config = _config(context, out, resume, options)
        listener: Progress = display
        if tensorboard is not None and leading():
            listener = _with_events(display, tensorboard)
        result = train(config, out=out, resume=resume, force=force, data_dir=data_dir, progress=listener)
        if leading():
            learning_curves(result.history, out / CURVES, title=_title(config))
            display.show_result(result, written=(result.model, result.checkpoint, out / CURVES))


def _config(context: click.Context, out: Path, resume: bool, options: dict[str, Any]) -> TrainingConfig:
    """The recipe; of a resumed run, with what was given now."""
    from bnexport.cli.options import numbers, read_model_options
    from bnexport.training.directory import RunDirectory

    values = {
        **options,
        "model_options": read_model_options(options["model_options"]),
        "mean": () if options["mean"] is None else numbers(options["mean"], "--mean"),
        "std": () if options["std"] is None else numbers(options["std"], "--std"),
    }
    if not resume:
        return TrainingConfig(**values)
    given = {name: value for name, value in values.items() if was_given(context, name)}
    return RunDirectory(out).config_to_resume(given)


def _with_events(display: Progress, folder: Path) -> Progress:
    from bnexport.training.events import EventFiles
    from bnexport.training.progress import Both

    return Both(display, EventFiles(folder))


def _title(config: TrainingConfig) -> str:
    name = f"BN-LeNet ({config.norm})" if config.model == _DEFAULT.model else config.model
    return f"{name} on {config.dataset}"
