"""Event files for TensorBoard (extra ``tensorboard``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bnexport.files import output_errors
from bnexport.optional import require
from bnexport.training.config import TrainingConfig
from bnexport.training.progress import EpochMetrics, Progress

#: Name in TensorBoard -> field of EpochMetrics. Both losses share one chart, both accuracies another.
_SCALARS = {
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/test": "test_accuracy",
    "learning_rate": "learning_rate",
    "examples_per_s": "examples_per_s",
}


class EventFiles(Progress):
    """Listener that writes each epoch's numbers."""

    def __init__(self, folder: Path) -> None:
        """Find the package; the folder is written from ``on_start`` on, so that a refused run leaves none behind.

        Raises:
            MissingDependency: tensorboard is not installed.
        """
        require("tensorboard", purpose="--tensorboard")
        self._make = require("torch.utils.tensorboard", purpose="--tensorboard").SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def on_start(self, config: TrainingConfig, device: str, origin: str, first_epoch: int) -> None:  # noqa: ARG002
        """Open a file.

        Raises:
            OutputError: The folder can't be written.
        """
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
