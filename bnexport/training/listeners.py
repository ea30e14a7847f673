"""Listeners of a training run, the numbers of an epoch, and event files for TensorBoard (extra ``tensorboard``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnexport.files import output_errors
from bnexport.optional import require
from bnexport.training.config import TrainingConfig


@dataclass(frozen=True)
class EpochMetrics:
    """One whole epoch."""

    epoch: int  # From 1
    train_loss: float  # Mean cross-entropy over the epoch, in nats
    train_accuracy: float  # Over the epoch, 0 to 1
    test_loss: float  # Mean cross-entropy after the epoch, with the plain moving statistics, in nats
    test_accuracy: float  # Accuracy after the epoch, 0 to 1
    learning_rate: float  # Learning rate of the last step
    examples_per_s: float  # Training images per second, of all processes; evaluation is not timed

    def to_json(self) -> dict[str, Any]:
        """A row of the history."""
        return asdict(self)


class TrainingListener:
    """Listener of a training run; every method may be overridden and does nothing here."""

    def on_download(self, file: str, done: int, total: int | None) -> None:
        """Bytes of a file of the data set, so far and in all (None when unknown)."""

    def on_start(self, config: TrainingConfig, device: str, origin: str, first_epoch: int) -> None:
        """The data are loaded; ``first_epoch`` is above 1 in a resumed run, above ``epochs`` in a complete one."""

    def on_files(self, done: int, total: int) -> None:
        """Image files of a folder that were decoded, so far and in all; only the first time."""

    def on_note(self, text: str) -> None:
        """Something that the user should know, as a sentence without its full stop."""

    def on_batch(self, done: int, total: int) -> None:
        """Steps of the running epoch, so far and in all; it must be quick and not wait for the device."""

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is over and saved."""

    def on_end(self) -> None:
        """The run is over, well or not."""


class Both(TrainingListener):
    """Several listeners as one: each method calls that of all, in order."""

    def __init__(self, *listeners: TrainingListener) -> None:
        for name in (name for name in vars(TrainingListener) if name.startswith("on_")):
            setattr(self, name, _calling([getattr(listener, name) for listener in listeners]))


def _calling(methods: list[Callable[..., None]]) -> Callable[..., None]:
    def call(*args: Any) -> None:
        for method in methods:
            method(*args)

    return call


#: Name in TensorBoard -> field of EpochMetrics. Both losses share one chart, both accuracies another.
_SCALARS = {
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/test": "test_accuracy",
    "learning_rate": "learning_rate",
    "examples_per_s": "examples_per_s",
}


class EventFiles(TrainingListener):
    """Listener that writes each epoch's numbers."""

    def __init__(self, folder: Path) -> None:
        """Find tensorboard, or raise MissingDependency. ``on_start`` makes the folder, so a refused run leaves none."""
        require("tensorboard", purpose="--tensorboard")
        self._make = require("torch.utils.tensorboard", purpose="--tensorboard").SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def on_start(self, config: TrainingConfig, device: str, origin: str, first_epoch: int) -> None:  # noqa: ARG002
        """Open a file; OutputError if the folder can't be written."""
        with output_errors(self._folder):
            self._writer = self._make(str(self._folder))

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Write the epoch's numbers; they are on disk afterwards."""
        for name, attribute in _SCALARS.items():
            self._writer.add_scalar(name, getattr(metrics, attribute), metrics.epoch)
        self._writer.flush()

    def on_end(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
