"""One training of the chapter's experiments, with what is asked of the network after each of its epochs."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.chapter.plan import RunSpec
from bnexport.data.datasets import load_dataset
from bnexport.environment import environment, versions_of
from bnexport.errors import DataError, Diverged, UsageError
from bnexport.nn.batch_norm import BatchNorm
from bnexport.nn.moving_statistics import recalibrate
from bnexport.nn.statistics import DEFAULT_EPS, LayerStatistics, layer_statistics
from bnexport.tensors import Array
from bnexport.training.config import TrainingConfig
from bnexport.training.cpu_kernels import pooling_by_products
from bnexport.training.loop import Epochs, Outcome, batches_of, epoch_order, evaluate
from bnexport.training.networks import build_network
from bnexport.training.optimisers import make_optimizer
from bnexport.training.samples import Samples, make_samples
from bnexport.training.step import Step

#: Training images that statistics are re-estimated over after each epoch.
RECALIBRATION = 10_000
#: A run none of whose accuracies ends above so many times that of guessing has not learned. All are asked: with stale
#: statistics a trained network guesses in eval mode, with tiny batches in training.
CHANCE_FACTOR = 2.0
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class EpochResult:
    """The network after one epoch.

    Attributes:
        train_loss: Mean over the epoch, in nats.
        train_accuracy: Mean over the epoch, 0 to 1.
        test_loss: With the moving statistics, in nats.
        test_accuracy: With the moving statistics.
        exact_accuracy: Test accuracy with re-estimated statistics; None without BatchNorm.
        shift: Distance of the moving means from the re-estimated ones in standard deviations: root mean square over all
            channels of all layers; None without BatchNorm.
        scale: Root mean square of ln(moving / re-estimated standard deviation), likewise.
    """

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    exact_accuracy: float | None = None
    shift: float | None = None
    scale: float | None = None


@dataclass(frozen=True)
class RunResult:
    """One training.

    Attributes:
        spec: What was trained.
        history: One entry for each whole epoch.
        diverged: The epoch in which loss or weights ceased to be finite; None when they did not.
        classes: Of the data set.
        affine: Layer -> its gamma and beta (channels,) at the end; empty without BatchNorm, and of a diverged run.
        moving_var: Layer -> geometric mean over the channels of its moving variance + eps at the end, likewise.
        conditions: Hardware, versions and threads.
        seconds: That it took.
    """

    spec: RunSpec
    history: tuple[EpochResult, ...]
    diverged: int | None
    classes: int
    affine: Mapping[str, Mapping[str, list[float]]]
    moving_var: Mapping[str, float]
    conditions: Mapping[str, Any]
    seconds: float

    @property
    def outcome(self) -> str:
        """One of "learned", "chance" and "diverged"."""
        if self.diverged is not None:
            return "diverged"
        last = self.history[-1]
        best = max(last.train_accuracy, last.test_accuracy, last.exact_accuracy or 0.0)
        return "learned" if best > CHANCE_FACTOR / self.classes else "chance"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunResult:
        """Read what ``to_json`` wrote.

        Raises:
            DataError: It is something else.
        """
        try:
            history = tuple(EpochResult(**epoch) for epoch in value["history"])
            return cls(**{**value, "spec": RunSpec(**value["spec"]), "history": history})
        except (TypeError, KeyError) as error:
            raise DataError(
                "this is no result of a training", remedy="Remove the file, or name another folder"
            ) from error


def measure(spec: RunSpec) -> RunResult:
    """Train once, on the CPU.

    Raises:
        DataError, NetworkError: As ``data.datasets.load_dataset``.
    """
    started = time.perf_counter()
    train, test, classes = _samples(spec.dataset, spec.images, spec.test_images)
    config = _config(spec)
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
    return RunResult(
        spec,
        tuple(history),
        diverged,
        classes,
        {layer.name: _affine(layer) for layer in layers},
        {layer.name: _geometric_mean(layer) for layer in layers},
        conditions(),
        round(time.perf_counter() - started, 2),
    )


def conditions() -> dict[str, Any]:
    """Hardware and versions, those of figures among them, and the threads of this process."""
    record = environment()
    packages = record["packages"] | versions_of("matplotlib")
    return record | {"packages": packages, "threads": torch.get_num_threads()}


@functools.lru_cache(maxsize=2)
def _samples(dataset: str, images: int, test_images: int) -> tuple[Samples, Samples, int]:
    """Training part, test part, classes; kept, because a process trains many networks on them."""
    found = load_dataset(dataset)
    for asked, there in ((images, len(found.train_labels)), (test_images, len(found.test_labels))):
        if asked > there:
            raise UsageError(f"{dataset} has {there} images, not {asked}", remedy="Take --quick for a small data set")
    preprocessing = TrainingConfig(dataset=dataset).preprocessing()
    train = make_samples(found.train_images[:images], found.train_labels[:images], preprocessing, _CPU)
    test = make_samples(found.test_images[:test_images], found.test_labels[:test_images], preprocessing, _CPU)
    return train, test, len(found.labels)


def _config(spec: RunSpec) -> TrainingConfig:
    return TrainingConfig(
        dataset=spec.dataset,
        norm=spec.norm.partition("-")[0],
        epochs=spec.epochs,
        lr=spec.lr,
        batch_size=spec.batch_size,
        device="cpu",
        seed=spec.seed,
    )


def _after_epoch(model: nn.Module, trained: Outcome, train: Samples, test: Samples, spec: RunSpec) -> EpochResult:
    """What is asked of the network after an epoch.

    Raises:
        Diverged: Its weights are finite, but so large that its answers are not.
    """
    tested = evaluate(model, test)
    exact = _with_exact_statistics(model, train, test, spec) if spec.norm != "none" else ()
    result = EpochResult(trained.loss, trained.accuracy, tested.loss, tested.accuracy, *exact)
    if not all(math.isfinite(value) for value in vars(result).values() if value is not None):
        raise Diverged("the loss on the test set is not finite", remedy="Lower the learning rate")
    return result


def _with_exact_statistics(
    model: nn.Module, train: Samples, test: Samples, spec: RunSpec
) -> tuple[float, float, float]:
    """Test accuracy with re-estimated statistics, shift and scale; the network is as before afterwards."""
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
    """Gamma and beta (channels,), short enough to be committed; a picture shows no more."""
    return {name: [float(f"{getattr(channel, name):.5g}") for channel in layer.channels] for name in ("gamma", "beta")}


def _geometric_mean(layer: LayerStatistics) -> float:
    return math.exp(sum(math.log(channel.moving_var + DEFAULT_EPS) for channel in layer.channels) / len(layer.channels))
