"""Listeners of a training run, the metrics of an epoch, and event files for TensorBoard (extra ``tensorboard``)."""

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
    """The metrics of one whole epoch."""

    epoch: int  # Number of the epoch, from 1
    train_loss: float  # Mean cross-entropy over the epoch, in nats
    train_accuracy: float  # Accuracy over the epoch, 0 to 1
    test_loss: float  # Mean cross-entropy after the epoch, with the moving statistics, in nats
    test_accuracy: float  # Accuracy after the epoch, 0 to 1
    learning_rate: float  # Learning rate of the last step
    examples_per_s: float  # Training images per second of all processes, without the evaluation

    def to_json(self) -> dict[str, Any]:
        """Return the row of the history."""
        return asdict(self)


class TrainingListener:
    """Listener of a training run; the methods do nothing and may be overridden."""

    def on_download(self, file: str, done: int, total: int | None) -> None:
        """Receive the downloaded and the total bytes (None if unknown) of a file of the data set."""

    def on_start(self, config: TrainingConfig, device: str, origin: str, first_epoch: int) -> None:
        """Receive the facts of the run after the data are loaded; ``first_epoch`` is above 1 in a resumed run."""

    def on_files(self, done: int, total: int) -> None:
        """Receive the decoded and the total number of image files of a folder; not called if they are in the cache."""

    def on_note(self, text: str) -> None:
        """Receive a note for the user, as a sentence without its full stop."""

    def on_batch(self, done: int, total: int) -> None:
        """Receive the finished and the total steps of an epoch; it must be fast and not wait for the device."""

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Receive the metrics of an epoch, after its checkpoint is written."""

    def on_end(self) -> None:
        """Called at the end of the run, also after an error."""


class Both(TrainingListener):
    """A listener that calls several listeners in order."""

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
    """Listener that writes each epoch's metrics for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        """Import tensorboard, or raise MissingDependency; ``on_start`` creates the folder, so a refused run leaves none."""
        require("tensorboard", purpose="--tensorboard")
        self._make = require("torch.utils.tensorboard", purpose="--tensorboard").SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def on_start(self, config: TrainingConfig, device: str, origin: str, first_epoch: int) -> None:  # noqa: ARG002
        """Open a file; OutputError if the folder can't be written."""
        with output_errors(self._folder):
            self._writer = self._make(str(self._folder))

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Write the epoch's metrics to disk."""
        for name, attribute in _SCALARS.items():
            self._writer.add_scalar(name, getattr(metrics, attribute), metrics.epoch)
        self._writer.flush()

    def on_end(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
