"""The run directory: what is in it, who may write it, how a run is found again.

::

    checkpoint.safetensors   weights and history after the last whole epoch: the truth that a resumed run starts from
    config.json              the recipe
    metrics.jsonl            one line per epoch, rewritten from the history
    model.safetensors        the result, with re-estimated moving statistics if asked for

Each file is replaced atomically, the checkpoint first, so the directory is readable after a kill at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bnexport.errors import ModelError, OutputError
from bnexport.files import output_errors, refuse_existing, write_atomically
from bnexport.nn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bnexport.optional import one_line
from bnexport.training.config import TrainingConfig

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
CURVES = "learning_curves.png"
_OURS = (CHECKPOINT, CONFIG, METRICS, MODEL, CURVES)


@dataclass(frozen=True)
class Saved:
    """The state after a whole epoch.

    Attributes:
        state: State dict.
        epoch: Whole epochs done.
        history: One row per epoch (``EpochMetrics.to_json``).
    """

    state: dict[str, Tensor]
    epoch: int
    history: list[dict[str, Any]]


class RunDirectory:
    """A run's folder on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def examine(self, config: TrainingConfig, *, resume: bool, force: bool) -> Saved | None:
        """Say whether the run may go here, before anything is loaded or written.

        Args:
            config: Of the run that starts or goes on.
            resume: Go on from the last whole epoch; a run that was killed before its first one begins anew.
            force: Replace a run that is there.

        Returns:
            The last whole epoch of the resumed run, None to begin anew.

        Raises:
            OutputError: The path is taken, is not a run, or can't be read.
            UsageError: The resumed run was started with other options.
            ModelError: Its checkpoint is damaged.
        """
        if not resume:
            # An empty folder may be a mounted volume, which can't be replaced but can be filled.
            if not (self.path.is_dir() and not any(self.path.iterdir())):
                self._refuse_taken(force)
            return None
        before, saved = self._read()
        if before is not None:
            config.check_continues(before)
        return saved

    def config_to_resume(self, given: Mapping[str, Any]) -> TrainingConfig:
        """The recipe of the run that is here, with the options that were given now; the defaults when there is no run.

        Raises:
            UsageError: A given option is out of range.
            OutputError: The path is not a run.
            ModelError: The run's checkpoint is damaged.
        """
        before, _ = self._read()
        return replace(before or TrainingConfig(), **given)

    def prepare(self, config: TrainingConfig, saved: Saved | None) -> None:
        """Make the directory ready; to begin anew, the files of an old run in it are removed, others stay.

        Raises:
            OutputError: It can't be written.
        """
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if saved is None:
                for name in _OURS:  # the checkpoint first: what is left after a kill here begins anew
                    (self.path / name).unlink(missing_ok=True)
            for name in _OURS:  # what a killed write left beside the files
                for part in self.path.glob(f".{name}.*.part"):
                    part.unlink(missing_ok=True)
        write_atomically(self.path / CONFIG, (json.dumps(config.to_json(), indent=1) + "\n").encode())
        if saved is not None:
            self._write_metrics(saved.history)

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep the state after a whole epoch: the checkpoint, then the metrics that its history holds."""
        save_checkpoint(self.path / CHECKPOINT, checkpoint)
        self._write_metrics(checkpoint.metadata["training"]["history"])

    def save_model(self, checkpoint: Checkpoint) -> Path:
        """Write the result of the run."""
        save_checkpoint(self.path / MODEL, checkpoint)
        return self.path / MODEL

    def _refuse_taken(self, force: bool) -> None:
        if not force and (self.path / CONFIG).exists():
            raise OutputError(
                f"{self.path} holds a run already",
                remedy="Choose another --out, go on with --resume, or replace it with --force",
            )
        refuse_existing(self.path, force=force)

    def _read(self) -> tuple[TrainingConfig | None, Saved | None]:
        """The recipe and the last whole epoch of the run that is here, as far as there are any."""
        return self._read_checkpoint() if (self.path / CHECKPOINT).exists() else (self._read_config(), None)

    def _read_checkpoint(self) -> tuple[TrainingConfig, Saved]:
        file = self.path / CHECKPOINT
        checkpoint = load_checkpoint(file)
        try:
            training = checkpoint.metadata["training"]
            saved = Saved(checkpoint.state, int(training["epoch"]), [dict(row) for row in training["history"]])
            if len(saved.history) != saved.epoch:
                raise ValueError(f"{len(saved.history)} rows for {saved.epoch} epochs")
            return TrainingConfig.from_json(training["config"]), saved
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{file} does not say how it was trained: {one_line(error)}", remedy="Start anew with --force"
            ) from error

    def _read_config(self) -> TrainingConfig | None:
        """The recipe of a run without a whole epoch; None when there is no run yet."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise OutputError(f"{self.path} is not a folder", remedy="Choose another --out")
        try:
            return TrainingConfig.from_json(json.loads((self.path / CONFIG).read_bytes()))
        except FileNotFoundError:
            if any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise OutputError(
                    f"{self.path} holds no run to resume", remedy="Check --out, or train without --resume"
                ) from None
            return None
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.path / CONFIG} can't be read: {one_line(error)}", remedy="Start anew with --force"
            ) from error

    def _write_metrics(self, history: list[dict[str, Any]]) -> None:
        write_atomically(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in history).encode())
