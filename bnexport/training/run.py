"""A whole training run: data, network, epochs, checkpoints, re-estimated statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.data.datasets import Dataset, load_dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import ModelError, RuntimeUnavailable, UsageError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.checkpoint import Checkpoint
from bnexport.nn.lenet import bn_lenet
from bnexport.nn.moving_statistics import recalibrate
from bnexport.optional import one_line
from bnexport.training.config import TrainingConfig
from bnexport.training.directory import CHECKPOINT, RunDirectory, Saved
from bnexport.training.loop import batches_of, epoch_order, evaluate, train_epoch
from bnexport.training.progress import EpochMetrics, Progress


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        config: The recipe.
        device: Where it ran: "cpu" or "cuda".
        origin: Where the data came from, in words.
        history: One row per epoch (``EpochMetrics.to_json``).
        test_accuracy: With the plain moving statistics, 0 to 1.
        recalibrated_accuracy: With the re-estimated ones; None when there are none.
        gamma: Of the first BatchNorm; None when the network has none.
        beta: Likewise.
        out: The run directory.
        checkpoint: The last whole epoch.
        model: The result.
    """

    config: TrainingConfig
    device: str
    origin: str
    history: tuple[dict[str, Any], ...]
    test_accuracy: float
    recalibrated_accuracy: float | None
    gamma: tuple[float, ...] | None
    beta: tuple[float, ...] | None
    out: Path
    checkpoint: Path
    model: Path


@dataclass(frozen=True)
class _Tensors:
    """A data set on the device: images (n, 1, 28, 28), labels (n,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def train(
    config: TrainingConfig,
    *,
    out: str | Path,
    resume: bool = False,
    force: bool = False,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train BN-LeNet and write a run directory.

    Args:
        config: The recipe.
        out: The run directory.
        resume: Go on from the last whole epoch in it. On a CPU with the same number of threads the weights come out the
            same, bit for bit, as without the interruption.
        force: Replace a run that is there.
        data_dir: Root of data sets, see ``data.datasets.load_dataset``.
        progress: Told what happens.

    Raises:
        UsageError: Options that do not fit together or the resumed run, or a training that diverged.
        OutputError: The directory is taken or can't be written.
        ModelError: The checkpoint to resume from is damaged.
        DataError: The data can't be read.
        NetworkError: The data can't be downloaded.
        RuntimeUnavailable: CUDA was asked for and is not here.
    """
    if resume and force:
        raise UsageError("--resume and --force contradict each other", remedy="Give one of them")
    listener = progress or Progress()
    device = choose_device(config.device)
    directory = RunDirectory(out)
    saved = directory.examine(config, resume=resume, force=force)
    dataset = load_dataset(config.dataset, data_dir=data_dir, progress=listener.on_download)
    _check_last_batch(config, len(dataset.train_labels))
    network = _network(config, dataset, saved, directory)
    directory.prepare(config, saved)
    history = saved.history if saved is not None else []
    listener.on_start(config, device.type, dataset.origin, len(history) + 1)
    run = _Run(config, dataset, network.to(device), _to_device(dataset, device), directory, history)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr)
    for epoch in range(len(history) + 1, config.epochs + 1):
        metrics = run.take_epoch(epoch, optimizer, listener)
        directory.save(run.checkpoint())
        listener.on_epoch(metrics)
    return run.finish()


def choose_device(name: str) -> torch.device:
    """The device for one of ``config.DEVICES``.

    Raises:
        RuntimeUnavailable: CUDA was asked for by name and torch finds no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailable(
            "torch finds no CUDA device here", remedy="Use --device cpu, or install a CUDA build of torch and a driver"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def first_batch_norm(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Gamma and beta (channels,) of the first BatchNorm, on the CPU; None when there is none."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            return module.gamma.detach().cpu(), module.beta.detach().cpu()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            return module.weight.detach().cpu(), module.bias.detach().cpu()
    return None


@dataclass
class _Run:
    """A run between its preparation and its result."""

    config: TrainingConfig
    dataset: Dataset
    model: nn.Module
    tensors: _Tensors
    directory: RunDirectory
    history: list[dict[str, Any]]

    def take_epoch(self, epoch: int, optimizer: torch.optim.Optimizer, listener: Progress) -> EpochMetrics:
        """Train one epoch, evaluate, and add it to the history."""
        count = len(self.tensors.train_labels)
        start = time.perf_counter()
        loss, accuracy = train_epoch(
            self.model,
            self.tensors.train_images,
            self.tensors.train_labels,
            optimizer,
            order=epoch_order(count, seed=self.config.seed, epoch=epoch),
            batch_size=self.config.batch_size,
            on_batch=listener.on_batch,
        )
        duration_s = time.perf_counter() - start
        metrics = EpochMetrics(epoch, loss, accuracy, self._test_accuracy(), count / duration_s)
        self.history.append(metrics.to_json())
        return metrics

    def finish(self) -> TrainingResult:
        """Re-estimate the moving statistics if asked for, and write the result."""
        plain = float(self.history[-1]["test_accuracy"])
        recalibrated = self._recalibrate() if self.config.recalibrate else None
        accuracies = {"moving": plain, "recalibrated": recalibrated}
        model = self.directory.save_model(self.checkpoint(recalibrated=recalibrated is not None, accuracies=accuracies))
        first = first_batch_norm(self.model)
        return TrainingResult(
            config=self.config,
            device=self.tensors.train_images.device.type,
            origin=self.dataset.origin,
            history=tuple(self.history),
            test_accuracy=plain,
            recalibrated_accuracy=recalibrated,
            gamma=None if first is None else tuple(first[0].tolist()),
            beta=None if first is None else tuple(first[1].tolist()),
            out=self.directory.path,
            checkpoint=self.directory.path / CHECKPOINT,
            model=model,
        )

    def checkpoint(
        self, *, recalibrated: bool = False, accuracies: dict[str, float | None] | None = None
    ) -> Checkpoint:
        """The weights now, with what is known about them."""
        training: dict[str, Any] = {
            "epoch": len(self.history),
            "epochs": self.config.epochs,
            "config": self.config.to_json(),
            "history": self.history,
        }
        if accuracies is not None:
            training["test_accuracy"] = accuracies
        metadata = {
            "network": {"source": "bn_lenet", "options": _options(self.config, self.dataset)},
            "dataset": self.dataset.name,
            "labels": list(self.dataset.labels),
            "preprocessing": Preprocessing().to_json(),
            "training": training,
            "recalibrated": recalibrated,
        }
        return Checkpoint(self.model.state_dict(), metadata)

    def _recalibrate(self) -> float | None:
        """Test accuracy with re-estimated statistics; None for a network without moving statistics."""
        images = self.tensors.train_images
        order = epoch_order(len(images), seed=self.config.seed, epoch=0)  # a set sorted by label would skew the batches
        layers = recalibrate(self.model, batches_of(images, order, self.config.batch_size))
        return self._test_accuracy() if layers else None

    def _test_accuracy(self) -> float:
        return evaluate(self.model, self.tensors.test_images, self.tensors.test_labels)


def _options(config: TrainingConfig, dataset: Dataset) -> dict[str, Any]:
    return {"norm": config.norm, "in_channels": 1, "num_classes": len(dataset.labels)}


def _network(config: TrainingConfig, dataset: Dataset, saved: Saved | None, directory: RunDirectory) -> nn.Module:
    """The network with its initial weights, or with the saved ones; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = bn_lenet(**_options(config, dataset))
    if saved is not None:
        try:
            network.load_state_dict(saved.state)
        except RuntimeError as error:
            raise ModelError(
                f"{directory.path / CHECKPOINT} does not fit the network: {one_line(error)}",
                remedy="Start anew with --force",
            ) from error
    return network


def _to_device(dataset: Dataset, device: torch.device) -> _Tensors:
    apply = Preprocessing().apply
    return _Tensors(
        torch.from_numpy(apply(dataset.train_images)).to(device),
        torch.from_numpy(dataset.train_labels).to(device),
        torch.from_numpy(apply(dataset.test_images)).to(device),
        torch.from_numpy(dataset.test_labels).to(device),
    )


def _check_last_batch(config: TrainingConfig, count: int) -> None:
    """BatchNorm has no variance of one image after a fully connected layer; say so before an epoch is spent."""
    if config.norm != "none" and (config.batch_size == 1 or count % config.batch_size == 1):
        raise UsageError(
            f"with batch-size {config.batch_size} a batch of one of the {count} images is left, "
            "and BatchNorm needs at least 2",
            remedy="Choose another --batch-size",
        )
