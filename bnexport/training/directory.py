"""The run directory: its files, its lock, and the state from which a run resumes.

::

    checkpoint.safetensors   weights, optimiser and history after the last whole epoch; a resumed run starts from it
    config.json              the configuration
    metrics.jsonl            one line per epoch, rewritten from the history
    model.safetensors        the result, by default with re-estimated moving statistics
    .run.lock                lock of the run that writes here

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
from bnexport.training.config import START_ANEW, TrainingConfig

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

    state: dict[str, Tensor]  # State dict of the network
    epoch: int  # Number of whole epochs
    history: list[dict[str, Any]]  # One row per epoch (``EpochMetrics.to_json``)
    optimizer: dict[str, Tensor] = field(default_factory=dict)  # State of the optimiser
    # Environment on which the last bit of the weights depends: device, processes, threads, torch
    made_by: Mapping[str, Any] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)  # State of the loss scaler (float16)


class RunDirectory:
    """The folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint_path = self.path / CHECKPOINT
        self.model_path = self.path / MODEL

    def examine(self, config: TrainingConfig, *, resume: bool, force: bool) -> SavedEpoch | None:
        """Return the last whole epoch of the run to resume, or None to start from the beginning; nothing is written."""
        if not resume:
            # An empty folder may be a mounted volume, which can't be replaced but can be filled.
            if not self.path.is_dir() or self._entries():
                if not force and (self.path / CONFIG).exists():
                    raise OutputError(
                        f"{self.path} has a run already",
                        remedy="Choose another --out, continue it with --resume, or replace it with --force",
                    )
                refuse_existing(self.path, force=force)
            return None
        before, saved = self._read()
        if before is not None:
            config.check_continues(before)
        return saved

    def config_to_resume(self, given: Mapping[str, Any]) -> TrainingConfig:
        """Return the configuration of the existing run, or the default one, with the given options replaced."""
        before, _ = self._read()
        return replace(before or TrainingConfig(), **given)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for one run, or raise OutputError; the system releases the lock when the process ends."""
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
            if made and not self._entries():  # a refused run leaves no folder
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def prepare(self, config: TrainingConfig, saved: SavedEpoch | None) -> None:
        """Create the directory and its configuration; a new run removes the files of an old run and keeps other files."""
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if saved is None:
                for name in _OURS:  # the checkpoint first: after a kill in this loop the run starts from the beginning
                    (self.path / name).unlink(missing_ok=True)
            for name in _OURS:  # parts that a killed write left
                for part in self.path.glob(f".{name}.*.part"):
                    part.unlink(missing_ok=True)
        write_atomically(self.path / CONFIG, (json.dumps(config.to_json(), indent=1) + "\n").encode())
        if saved is not None:
            self._write_metrics(saved.history)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the state after a whole epoch: the checkpoint, then the metrics in its history."""
        save_checkpoint(self.checkpoint_path, checkpoint)
        self._write_metrics(checkpoint.metadata["training"]["history"])

    def _entries(self) -> list[str]:
        return [entry.name for entry in self.path.iterdir() if entry.name != LOCK]

    def _read(self) -> tuple[TrainingConfig | None, SavedEpoch | None]:
        """Return the configuration and the last whole epoch of the existing run; None for what is missing."""
        return self._read_checkpoint() if self.checkpoint_path.exists() else (self._read_config(), None)

    def _read_checkpoint(self) -> tuple[TrainingConfig, SavedEpoch]:
        checkpoint = load_checkpoint(self.checkpoint_path)
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
            message = f"{self.checkpoint_path} has no readable description of its training: {one_line(error)}"
            raise ModelError(message, remedy=START_ANEW) from error

    def _read_config(self) -> TrainingConfig | None:
        """Return the configuration of a run without a whole epoch; None without a run."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise OutputError(f"{self.path} is not a folder", remedy="Choose another --out")
        try:
            return TrainingConfig.from_json(json.loads((self.path / CONFIG).read_bytes()))
        except FileNotFoundError:
            if any(not name.startswith(".") for name in self._entries()):
                raise OutputError(
                    f"{self.path} has no run to resume", remedy="Check --out, or train without --resume"
                ) from None
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.path / CONFIG} can't be read: {one_line(error)}", remedy=START_ANEW) from error

    def _write_metrics(self, history: list[dict[str, Any]]) -> None:
        write_atomically(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in history).encode())
