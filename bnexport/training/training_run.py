"""A training run: data, network, epochs, checkpoints, re-estimated statistics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bnexport.errors import Diverged, UsageError
from bnexport.loading.checkpoint import Checkpoint, save_checkpoint
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.moving_statistics import norm_layers, recalibrate
from bnexport.nn.stale_statistics import staleness
from bnexport.nn.statistics import eps_of
from bnexport.reproducibility import seeded
from bnexport.training.config import TrainingConfig
from bnexport.training.directory import RunDirectory, SavedEpoch
from bnexport.training.listeners import EpochMetrics, TrainingListener
from bnexport.training.loop import Epochs, MeanMetrics, batches_of, epoch_order, epoch_seed, evaluate
from bnexport.training.optimisers import learning_rate, optimizer_tensors, set_learning_rate
from bnexport.training.preparation import Prepared, made_by, network_facts, prepare, resume_note
from bnexport.training.processes import open_world
from bnexport.training.recording import obstacle, recorded_by_default
from bnexport.training.step import pooling_by_products


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run."""

    config: TrainingConfig  # The configuration
    device: str  # "cpu" or "cuda"
    origin: str  # Origin of the data, in words
    history: tuple[dict[str, Any], ...]  # One row per epoch (``EpochMetrics.to_json``)
    test_accuracy: float  # Accuracy with the moving statistics, 0 to 1
    recalibrated_accuracy: float | None  # Accuracy with the re-estimated statistics; None without them
    gamma: tuple[float, ...] | None  # Gamma of the first BatchNorm; None if the network has none
    beta: tuple[float, ...] | None  # Beta of the first BatchNorm; None if the network has none
    out: Path  # The run directory
    checkpoint: Path  # The last whole epoch
    model: Path  # The resulting model


def first_batch_norm(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return gamma and beta (channels,) of the first BatchNorm, on the CPU; None without a BatchNorm."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            return module.gamma.detach().cpu(), module.beta.detach().cpu()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            return module.weight.detach().cpu(), module.bias.detach().cpu()
    return None


def train(
    config: TrainingConfig,
    *,
    out: str | Path,
    resume: bool = False,
    force: bool = False,
    data_dir: str | Path | None = None,
    progress: TrainingListener | None = None,
) -> TrainingResult:
    """Train a classifier and write a run directory.

    Under torchrun each process calls this function. The first process's configuration counts for all, and it alone writes
    files and reports progress.

    Example:
        >>> from bnexport.training.config import TrainingConfig
        >>> from bnexport.training.training_run import train
        >>> result = train(TrainingConfig(dataset="digits", epochs=2), out="runs/digits")  # doctest: +SKIP
        >>> result.model.name  # doctest: +SKIP
        'model.safetensors'

    Args:
        config: The configuration.
        out: The run directory.
        resume: Continue from the last whole epoch in ``out``. On a CPU with the same number of processes and threads the
            weights equal those of an uninterrupted run bit for bit; otherwise ``progress`` receives a note with the reason.
        force: Replace an existing run.
        data_dir: Root of data sets, see ``data.datasets.load_dataset``.
        progress: Listener of the run.

    Returns:
        Accuracies, history, and the paths of the written files.

    Raises:
        UsageError: The options contradict each other or the resumed run.
        Diverged: The loss is no longer finite.
        OutputError: The directory is taken, another run is writing there, or it can't be written.
        ModelError: The network can't be built, or the checkpoint to resume from is damaged.
        DataError: The data can't be read.
        NetworkError: A download failed.
        RuntimeUnavailable: CUDA is not available, or another process ended.
    """
    if resume and force:
        raise UsageError("--resume and --force contradict each other", remedy="Give one of them")
    directory, given = RunDirectory(out), config
    with open_world(config.device) as world, contextlib.ExitStack() as held:
        listener = progress if progress is not None and world.leads else TrainingListener()
        held.callback(listener.on_end)
        config = world.from_leader(lambda: given)

        def examined() -> SavedEpoch | None:
            directory.examine(config, resume=resume, force=force)  # a folder that is not a run is not locked
            held.enter_context(directory.locked())
            return directory.examine(config, resume=resume, force=force)

        saved = world.from_leader(examined)
        prepared = world.all_do(lambda: prepare(config, saved, world, data_dir=data_dir, listener=listener))
        world.from_leader(lambda: directory.prepare(config, saved))
        with pooling_by_products(prepared.model):
            return _TrainingRun(prepared, directory, listener).go(saved)


#: Training images for the check of the statistics: enough to distinguish 0.15 standard deviations from chance.
_CHECKED_IMAGES = 1024


class _TrainingRun:
    """A prepared run."""

    def __init__(self, prepared: Prepared, directory: RunDirectory, listener: TrainingListener) -> None:
        self.prepared, self.directory, self.listener = prepared, directory, listener
        config = self.config = prepared.config
        self.world = prepared.world
        self.model, self.dataset = prepared.model, prepared.dataset
        self.history: list[dict[str, Any]] = []
        wanted = recorded_by_default(config.model) if config.cuda_graph is None else config.cuda_graph
        self._obstacle = obstacle(config, prepared.train, self.world)
        self.epochs = Epochs(
            prepared.step(self.model),
            prepared.train,
            batch_size=config.batch_size,
            capture=wanted and self._obstacle is None,
            on_note=listener.on_note,
        )

    def go(self, saved: SavedEpoch | None) -> TrainingResult:
        """Train the remaining epochs, and write the result."""
        self.history = saved.history if saved is not None else []
        device = self.world.device.type
        self.listener.on_start(self.config, device, self.dataset.origin, len(self.history) + 1)
        if saved is not None and (note := resume_note(saved.made_by, made_by(self.world))) is not None:
            self.listener.on_note(note)
        if self.config.cuda_graph and self._obstacle is not None:
            self.listener.on_note(self._obstacle)
        for epoch in range(len(self.history) + 1, self.config.epochs + 1):
            metrics = self._take_epoch(epoch)
            self.world.from_leader(lambda: self.directory.save(self._checkpoint()))
            self.listener.on_epoch(metrics)
        return self._finish()

    def _take_epoch(self, epoch: int) -> EpochMetrics:
        """Train one epoch, evaluate, and add it to the history."""
        count, config = self.prepared.train.count, self.config
        start, steps = time.perf_counter(), self.epochs.steps()

        def before_step(number: int) -> None:
            rate = learning_rate(config, (epoch - 1) * steps + number, steps)
            set_learning_rate(self.prepared.optimizer, rate)

        scheduled = config.schedule != "constant" or config.warmup_epochs > 0
        # Dropout and a network's own draws depend on seed, epoch and process, so a resumed run draws the same numbers.
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with seeded(epoch_seed(config.seed, epoch, self.world.rank, 1), devices=devices):
            try:
                trained = self.epochs.take(
                    epoch_order(count, seed=config.seed, epoch=epoch),
                    before_step=before_step if scheduled else None,
                    on_batch=self.listener.on_batch,
                )
            except Diverged as error:
                last = self.directory.checkpoint_path
                kept = f"; {last} has epoch {epoch - 1}, which was finite" if epoch > 1 else ""
                remedy = f"Lower --lr, or add --warmup-epochs 1{kept}"
                raise Diverged(f"{error.message} of epoch {epoch}", remedy=remedy) from error
        duration_s = time.perf_counter() - start
        tested = self._tested()
        rate = learning_rate(config, epoch * steps - 1, steps)
        metrics = EpochMetrics(
            epoch, trained.loss, trained.accuracy, tested.loss, tested.accuracy, rate, count / duration_s
        )
        self.history.append(metrics.to_json())
        return metrics

    def _finish(self) -> TrainingResult:
        """Re-estimate the moving statistics by the configuration, and write the result."""
        plain = float(self.history[-1]["test_accuracy"])
        stale = self._check_statistics()
        recalibrated = self._recalibrate() if self.config.recalibrate else None
        facts = {"test_accuracy": {"moving": plain, "recalibrated": recalibrated}, "staleness": stale}
        path = self.directory.model_path
        self.world.from_leader(lambda: save_checkpoint(path, self._result(recalibrated is not None, facts)))
        first = first_batch_norm(self.model)
        return TrainingResult(
            config=self.config,
            device=self.world.device.type,
            origin=self.dataset.origin,
            history=tuple(self.history),
            test_accuracy=plain,
            recalibrated_accuracy=recalibrated,
            gamma=None if first is None else tuple(first[0].tolist()),
            beta=None if first is None else tuple(first[1].tolist()),
            out=self.directory.path,
            checkpoint=self.directory.checkpoint_path,
            model=self.directory.model_path,
        )

    def _checkpoint(self) -> Checkpoint:
        """Return the checkpoint of the current weights, from which a run can resume."""
        found = self._result(False, {})
        if scaler := self.epochs.step.scaler.state_dict():
            found.metadata["training"]["scaler"] = scaler
        return replace(found, optimizer=optimizer_tensors(self.prepared.optimizer))

    def _result(self, recalibrated: bool, facts: Mapping[str, Any]) -> Checkpoint:
        """Return the current weights with their metadata."""
        training: dict[str, Any] = {
            "epoch": len(self.history),
            "epochs": self.config.epochs,
            "config": self.config.to_json(),
            "history": self.history,
            "made_by": made_by(self.world),
            **facts,
        }
        metadata = {
            "network": network_facts(self.config, len(self.dataset.labels), self.prepared.preprocessing),
            "dataset": self.dataset.name,
            "labels": list(self.dataset.labels),
            "preprocessing": self.prepared.preprocessing.to_json(),
            "training": training,
            "eps": eps_of(self.model),
            "recalibrated": recalibrated,
        }
        return Checkpoint(self.model.state_dict(), metadata)

    def _check_statistics(self) -> dict[str, Any] | None:
        """Compare the moving statistics with exact ones on some training images; None without moving statistics."""
        if not norm_layers(self.model):
            return None
        samples, size = self.prepared.train, self.config.batch_size
        order = epoch_order(samples.count, seed=self.config.seed, epoch=0)[: max(_CHECKED_IMAGES, size)]
        whole = order[: max(len(order) // size * size, min(size, len(order)))]  # no batch of one image at the end
        report = staleness(self.model, batches_of(samples, whole, size))
        if report.stale:
            done = {"remedy": "model.safetensors has them re-estimated"} if self.config.recalibrate else {}
            self.listener.on_note(report.sentence(**done))
        return report.to_json()

    def _recalibrate(self) -> float | None:
        """Re-estimate the statistics and return the test accuracy; None without moving statistics."""
        samples = self.prepared.train
        # A mixed order, because batches of a set that is sorted by label would be skewed.
        order = epoch_order(samples.count, seed=self.config.seed, epoch=0)
        layers = recalibrate(self.model, batches_of(samples, order, self.config.batch_size))
        return self._tested().accuracy if layers else None

    def _tested(self) -> MeanMetrics:
        return evaluate(self.model, self.prepared.test, self.world)
