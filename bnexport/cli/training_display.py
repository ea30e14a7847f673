"""Display of ``bnexport train``: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from bnexport.cli.output import BarDisplay
from bnexport.errors import BadInput
from bnexport.training.config import LENET, TrainingConfig
from bnexport.training.listeners import EpochMetrics, TrainingListener
from bnexport.training.processes import asked_rank
from bnexport.training.training_run import TrainingResult

_MEGABYTE = 1e6
#: Largest number of values that are printed: two lines of 80 columns.
_MOST_VALUES = 16


def leading() -> bool:
    """Return True if this process writes and prints: it is alone, or torchrun's first."""
    return asked_rank() == 0


@contextlib.contextmanager
def quiet_followers() -> Iterator[None]:
    """Let the leading process alone report bad input; the others end with the same exit code."""
    try:
        yield
    except BadInput:
        if leading():
            raise
        raise SystemExit(2) from None


class TrainingDisplay(BarDisplay, TrainingListener):
    """Listener of a training that prints."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console or Console(highlight=False, markup=False, soft_wrap=True, quiet=not leading()))
        self._config = TrainingConfig()
        self._epoch = 1
        self._file = ""

    def on_download(self, file: str, done: int, total: int | None) -> None:
        """Show the bytes on the bar; in a log, name each file once."""
        if file != self._file:
            self._file = file
            size = f" ({total / _MEGABYTE:.1f} MB)" if total else ""
            self._console.print(f"downloading {file}{size}")
        self._bar.update(self._task, description=file, completed=done, total=total, visible=True)

    def on_start(self, config: TrainingConfig, device: str, origin: str, first_epoch: int) -> None:
        """Print the data set, the network, the configuration and the device."""
        self._config, self._epoch = config, first_epoch
        self._console.print(f"{config.dataset}: {origin}")
        schedule = f", warm-up {config.warmup_epochs:g} epochs" if config.warmup_epochs else ""
        schedule += f", {config.schedule}" if config.schedule != "constant" else ""
        network = f"BN-LeNet, norm {config.norm}" if config.model == LENET else config.model
        length = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
        self._console.print(
            f"{network}, {length}, {config.optimizer}, lr {config.lr:g}{schedule}, "
            f"batch {config.batch_size}, seed {config.seed}, on {device}"
        )
        if first_epoch > config.epochs:
            self._console.print(f"all {config.epochs} epochs are done already")
        elif first_epoch > 1:
            self._console.print(f"resuming after epoch {first_epoch - 1}")

    def on_files(self, done: int, total: int) -> None:
        """Show the decoded files on the bar; in a log, print one line."""
        if self._file != "images":
            self._file = "images"
            self._console.print(f"decoding {total} image files, once")
        self._bar.update(self._task, description="decoding", completed=done, total=total, visible=True)

    def on_note(self, text: str) -> None:
        """Print a note."""
        self._console.print(f"note: {text}")

    def on_batch(self, done: int, total: int) -> None:
        """Move the bar."""
        description = f"epoch {self._epoch}/{self._config.epochs}"
        self._bar.update(self._task, description=description, completed=done, total=total, visible=True)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Print the epoch's line."""
        self._epoch = metrics.epoch + 1
        width = len(str(self._config.epochs))
        self._console.print(
            f"epoch {metrics.epoch:{width}}/{self._config.epochs}  loss {metrics.train_loss:.3f}  "
            f"train acc {metrics.train_accuracy:.3f}  test acc {metrics.test_accuracy:.3f}  "
            f"{metrics.examples_per_s:.0f} examples/s"
        )

    def show_result(self, result: TrainingResult, written: Sequence[Path]) -> None:
        """Print gamma and beta of the first BatchNorm, the accuracies and the paths."""
        lines = ["the network has no BatchNorm, so no gamma and beta"]
        if result.gamma is not None and result.beta is not None:
            lines = [f"gamma of the first BatchNorm: {_row(result.gamma)}"]
            lines.append(f"beta of the first BatchNorm:  {_row(result.beta)}")
        if result.recalibrated_accuracy is None:
            lines.append(f"test accuracy: {result.test_accuracy:.4f}")
        else:
            lines.append(f"test accuracy with the moving statistics of training:  {result.test_accuracy:.4f}")
            lines.append(f"test accuracy with statistics of the whole training set: {result.recalibrated_accuracy:.4f}")
        lines += [f"written: {path}" for path in written]
        for line in lines:
            self._console.print(line)


def _row(values: Sequence[float]) -> str:
    """Return all values of a small layer, the range of a large one."""
    if len(values) > _MOST_VALUES:
        return f"{min(values):.4f} to {max(values):.4f} ({len(values)} channels)"
    return " ".join(f"{value:.4f}" for value in values)
