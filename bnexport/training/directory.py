"""The run directory: what is in it, who may write it, how a run is found again.

::

    checkpoint.safetensors   weights, optimiser and history after the last whole epoch: what a resumed run starts from
    config.json              the recipe
    metrics.jsonl            one line per epoch, rewritten from the history
    model.safetensors        the result, with re-estimated moving statistics if asked for
    .run.lock                locked while a run writes here, so that two can't

Each file is replaced atomically, the checkpoint first, so the directory is readable after a kill at any moment.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bnexport.errors import ModelError, OutputError
from bnexport.files import output_errors, refuse_existing, write_atomically
from bnexport.loading.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bnexport.optional import one_line
from bnexport.training.config import TrainingConfig

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
MODEL = "model.safetensors"
CURVES = "learning_curves.png"
LOCK = ".run.lock"
_OURS = (CHECKPOINT, CONFIG, METRICS, MODEL, CURVES)


@dataclass(frozen=True)
class SavedEpoch:
    """The state after a whole epoch."""

    state: dict[str, Tensor]  # State dict
    epoch: int  # Whole epochs done
    history: list[dict[str, Any]]  # One row per epoch (``EpochMetrics.to_json``)
    optimizer: dict[str, Tensor] = field(default_factory=dict)  # State of the optimiser
    # The environment that the weights depend on to the last bit: device, processes, threads, torch
    made_by: Mapping[str, Any] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)  # State of the scaling of the loss (float16)


class RunDirectory:
    """A run's folder on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint_path = self.path / CHECKPOINT
        self.model_path = self.path / MODEL

    def examine(self, config: TrainingConfig, *, resume: bool, force: bool) -> SavedEpoch | None:
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
            if not self.path.is_dir() or self._entries():
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

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for one run, or raise OutputError; the system frees it when a process ends, however it ends."""
        from filelock import FileLock, Timeout

        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is not a folder", remedy="Choose another --out")
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        with output_errors(self.path):
            try:
                lock.acquire()
            except Timeout as error:  # an OSError too
                raise OutputError(
                    f"another run is writing into {self.path}", remedy="Wait for its end, or choose another --out"
                ) from error
        try:
            yield
        finally:
            if made and not self._entries():  # a run that was refused leaves no folder behind
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def prepare(self, config: TrainingConfig, saved: SavedEpoch | None) -> None:
        """Make the directory ready, or raise OutputError. A new run removes the files of an old one; other files stay."""
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
        save_checkpoint(self.checkpoint_path, checkpoint)
        self._write_metrics(checkpoint.metadata["training"]["history"])

    def save_model(self, checkpoint: Checkpoint) -> None:
        """Write the result of the run."""
        save_checkpoint(self.model_path, checkpoint)

    def _entries(self) -> list[str]:
        return [entry.name for entry in self.path.iterdir() if entry.name != LOCK]

    def _refuse_taken(self, force: bool) -> None:
        if not force and (self.path / CONFIG).exists():
            raise OutputError(
                f"{self.path} holds a run already",
                remedy="Choose another --out, go on with --resume, or replace it with --force",
            )
        refuse_existing(self.path, force=force)

    def _read(self) -> tuple[TrainingConfig | None, SavedEpoch | None]:
        """The recipe and the last whole epoch of the run that is here, as far as there are any."""
        return self._read_checkpoint() if (self.path / CHECKPOINT).exists() else (self._read_config(), None)

    def _read_checkpoint(self) -> tuple[TrainingConfig, SavedEpoch]:
        file = self.path / CHECKPOINT
        checkpoint = load_checkpoint(file)
        try:
            training = checkpoint.metadata["training"]
            saved = SavedEpoch(
                checkpoint.state,
                int(training["epoch"]),
                [dict(row) for row in training["history"]],
                checkpoint.optimizer,
                dict(training.get("made_by") or {}),
                dict(training.get("scaler") or {}),
            )
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
            if any(not name.startswith(".") for name in self._entries()):
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
