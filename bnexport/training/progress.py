"""What a training run tells while it runs, and the numbers of an epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bnexport.training.config import TrainingConfig


@dataclass(frozen=True)
class EpochMetrics:
    """One whole epoch.

    Attributes:
        epoch: From 1.
        train_loss: Mean cross-entropy over the epoch, in nats.
        train_accuracy: Over the epoch, 0 to 1.
        test_accuracy: After the epoch, with the plain moving statistics, 0 to 1.
        examples_per_s: Training images per second; evaluation is not timed.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    examples_per_s: float

    def to_json(self) -> dict[str, Any]:
        """A row of the history."""
        return asdict(self)


class Progress:
    """Listener of a training run; every method may be overridden and does nothing here."""

    def on_download(self, file: str, done: int, total: int | None) -> None:
        """Bytes of a file of the data set, so far and in all (None when unknown)."""

    def on_start(self, config: TrainingConfig, device: str, origin: str, first_epoch: int) -> None:
        """The data are loaded; ``first_epoch`` is above 1 in a resumed run, above ``epochs`` in a complete one."""

    def on_batch(self, done: int, total: int) -> None:
        """Steps of the running epoch, so far and in all; it must be quick and not wait for the device."""

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is over and saved."""
