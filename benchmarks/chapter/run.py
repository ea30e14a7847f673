"""One training of the chapter's experiments, with the figures of the network after each of its epochs."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.chapter.plan import RunSpec
from bnexport.data.datasets import load_dataset
from bnexport.environment import environment, versions_of
from bnexport.errors import Diverged, UsageError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.moving_statistics import recalibrate
from bnexport.nn.statistics import DEFAULT_EPS, LayerStatistics, layer_statistics
from bnexport.tensors import Array
from bnexport.training.config import TrainingConfig
from bnexport.training.data_parts import DataPart, make_part
from bnexport.training.loop import Epochs, MeanMetrics, batches_of, epoch_order, evaluate
from bnexport.training.optimisers import make_optimizer
from bnexport.training.preparation import build_network
from bnexport.training.step import Step, pooling_by_products

#: Training images of the re-estimated statistics after each epoch.
RECALIBRATION = 10_000
#: A run has learned if one of its accuracies ends above this multiple of guessing. All count: with stale statistics a
#: trained network guesses in eval mode, with tiny batches in training.
CHANCE_FACTOR = 2.0
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class EpochResult:
    """The network after one epoch; losses in nats, accuracies 0 to 1."""

    train_loss: float  # mean over the epoch
    train_accuracy: float  # mean over the epoch
    test_loss: float  # with the moving statistics
    test_accuracy: float  # with the moving statistics
    exact_accuracy: float | None = None  # test accuracy with re-estimated statistics; None without BatchNorm
    #: Distance of the moving means from the re-estimated ones in standard deviations, root mean square over all channels.
    shift: float | None = None
    #: Root mean square of ln(moving / re-estimated standard deviation).
    scale: float | None = None


@dataclass(frozen=True)
class RunResult:
    """The result of one training."""

    spec: RunSpec
    history: tuple[EpochResult, ...]  # one entry per complete epoch
    diverged: int | None  # the epoch in which loss or weights became infinite
    classes: int
    affine: Mapping[str, Mapping[str, list[float]]]  # layer -> gamma and beta (channels,) at the end; empty if diverged
    moving_var: Mapping[str, float]  # layer -> geometric mean over the channels of moving variance + eps at the end
    conditions: Mapping[str, Any]  # hardware, versions and threads
    seconds: float

    @property
    def outcome(self) -> str:
        """Return "learned", "chance" or "diverged"."""
        if self.diverged is not None:
            return "diverged"
        last = self.history[-1]
        best = max(last.train_accuracy, last.test_accuracy, last.exact_accuracy or 0.0)
        return "learned" if best > CHANCE_FACTOR / self.classes else "chance"


def measure(spec: RunSpec) -> RunResult:
    """Train once on the CPU."""
    started = time.perf_counter()
    train, test, classes = _samples(spec.dataset, spec.images, spec.test_images)
    config = TrainingConfig(
        dataset=spec.dataset, norm=spec.norm.partition("-")[0], epochs=spec.epochs, lr=spec.lr, batch_size=spec.batch_size,
        device="cpu", seed=spec.seed,
    )  # fmt: skip
    model = build_network(config, classes, config.preprocessing())
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.unbiased = spec.norm == "scratch-unbiased"
    epochs = Epochs(Step(model, make_optimizer(model, config, _CPU)), train, batch_size=spec.batch_size)
    history: list[EpochResult] = []
    diverged = None
    with pooling_by_products(model):
        for epoch in range(1, spec.epochs + 1):
            try:
                trained = epochs.take(epoch_order(train.count, seed=spec.seed, epoch=epoch))
                history.append(_after_epoch(model, trained, train, test, spec))
            except Diverged:
                diverged = epoch
                break
    layers = layer_statistics(model.state_dict()) if diverged is None else []
    affine = {layer.name: _affine(layer) for layer in layers}
    variances = {layer.name: _geometric_mean(layer) for layer in layers}
    here = environment()
    here |= {"packages": here["packages"] | versions_of("matplotlib"), "threads": torch.get_num_threads()}
    taken = round(time.perf_counter() - started, 2)
    return RunResult(spec, tuple(history), diverged, classes, affine, variances, here, taken)


@functools.lru_cache(maxsize=2)
def _samples(dataset: str, images: int, test_images: int) -> tuple[DataPart, DataPart, int]:
    """Training part, test part, number of classes; cached, because a process trains many networks on them."""
    found = load_dataset(dataset)
    for wanted, count in ((images, len(found.train_labels)), (test_images, len(found.test_labels))):
        if wanted > count:
            raise UsageError(f"{dataset} has {count} images, not {wanted}", remedy="Take --quick for a small data set")
    preprocessing = TrainingConfig(dataset=dataset).preprocessing()
    train = make_part(found.train_images[:images], found.train_labels[:images], preprocessing, _CPU)
    test = make_part(found.test_images[:test_images], found.test_labels[:test_images], preprocessing, _CPU)
    return train, test, len(found.labels)


def _after_epoch(model: nn.Module, trained: MeanMetrics, train: DataPart, test: DataPart, spec: RunSpec) -> EpochResult:
    """Test the network after an epoch; Diverged if its weights are finite, but its answers are not."""
    tested = evaluate(model, test)
    exact = () if spec.norm == "none" else _with_exact_statistics(model, train, test, spec)
    result = EpochResult(trained.loss, trained.accuracy, tested.loss, tested.accuracy, *exact)
    if not all(math.isfinite(value) for value in vars(result).values() if value is not None):
        raise Diverged("the loss on the test set is not finite", remedy="Lower the learning rate")
    return result


def _with_exact_statistics(
    model: nn.Module, train: DataPart, test: DataPart, spec: RunSpec
) -> tuple[float, float, float]:
    """Test accuracy with re-estimated statistics, shift and scale; the network is unchanged afterwards."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    order = epoch_order(train.count, seed=spec.seed, epoch=0)[:RECALIBRATION]
    recalibrate(model, batches_of(train, order, spec.batch_size))
    accuracy = evaluate(model, test).accuracy
    moving, exact = _all_channels(before), _all_channels(model.state_dict())
    model.load_state_dict(before)
    deviation, exact_deviation = np.sqrt(moving[1] + DEFAULT_EPS), np.sqrt(exact[1] + DEFAULT_EPS)
    shift, scale = (moving[0] - exact[0]) / exact_deviation, np.log(deviation / exact_deviation)
    return accuracy, _root_mean_square(shift), _root_mean_square(scale)


def _all_channels(state: Mapping[str, Tensor]) -> Array:
    """Moving means and variances of all layers together, (2, channels)."""
    channels = [channel for layer in layer_statistics(state) for channel in layer.channels]
    return np.array([(channel.moving_mean, channel.moving_var) for channel in channels]).T


def _root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _affine(layer: LayerStatistics) -> dict[str, list[float]]:
    """Gamma and beta (channels,) with the five digits that a picture shows."""
    return {name: [float(f"{getattr(channel, name):.5g}") for channel in layer.channels] for name in ("gamma", "beta")}


def _geometric_mean(layer: LayerStatistics) -> float:
    return math.exp(sum(math.log(channel.moving_var + DEFAULT_EPS) for channel in layer.channels) / len(layer.channels))
