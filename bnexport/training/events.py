"""Event files for TensorBoard (extra ``tensorboard``)."""

from __future__ import annotations

from pathlib import Path

from bnexport.files import output_errors
from bnexport.optional import require
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
        """Open the folder.

        Raises:
            MissingDependency: tensorboard is not installed.
            OutputError: The folder can't be written.
        """
        require("tensorboard", purpose="--tensorboard")
        writer = require("torch.utils.tensorboard", purpose="--tensorboard").SummaryWriter
        with output_errors(folder):
            self._writer = writer(str(folder))

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Write the epoch's numbers; they are on disk afterwards."""
        for name, attribute in _SCALARS.items():
            self._writer.add_scalar(name, getattr(metrics, attribute), metrics.epoch)
        self._writer.flush()

    def on_end(self) -> None:
        """Close the file."""
        self._writer.close()
