"""Exact re-estimation of moving statistics from data.

This is "precise BatchNorm" (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021).

An exponential average over the last few noisy batches is a poor estimate of the statistics that a network's weights
were trained with. Here they are computed over a whole training set instead, with the final weights.

What is computed, exactly: the data pass through the network once. Every BatchNorm normalises each batch with that
batch's own statistics, as it did in training, so all layers are estimated in one pass and none depends on old moving
statistics. Per layer and channel the mean and the population variance are those of ALL values that reached the layer:
batch variances and the spread of the batch means together (law of total variance), so batches count by their size.
Sums are kept in float64 as (count, mean, sum of squared deviations) and merged by the formula of Chan, Golub and
LeVeque (1979): memory is constant in the number of batches, and their order changes the result by rounding only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.errors import DataError, FeedError, ModelError
from bnexport.nn.batch_norm import BatchNorm


class RunningMoments:
    """Count, mean and sum of squared deviations per channel of all values added so far, in float64.

    Attributes:
        count: Values per channel.
        mean: (channels,).
        squares: (channels,), the sum of ``(value - mean) ** 2``.
        calls: How many times ``add`` was called.
    """

    def __init__(self) -> None:
        self.count = 0
        self.calls = 0
        self.mean = torch.zeros(1, dtype=torch.float64)
        self.squares = torch.zeros(1, dtype=torch.float64)

    def add(self, X: Tensor) -> None:
        """Add a batch (N, C) or (N, C, ...)."""
        count = X.numel() // X.shape[1]
        dims = [dim for dim in range(X.dim()) if dim != 1]
        var, mean = torch.var_mean(X.double(), dim=dims, correction=0)
        total, delta = self.count + count, mean - self.mean.to(mean.device)
        self.mean = self.mean.to(mean.device) + delta * (count / total)
        self.squares = self.squares.to(mean.device) + var * count + delta**2 * (self.count * count / total)
        self.count = total
        self.calls += 1


def recalibrate(
    model: nn.Module, batches: Iterable[Tensor | Sequence[Any]], *, device: torch.device | str | None = None
) -> int:
    """Replace the moving statistics of every BatchNorm by the exact ones over ``batches``.

    Works on ``nn.BatchNorm1d/2d/3d`` with moving statistics and on ``BatchNorm`` from scratch; a layer called several
    times in one forward pass gets the statistics of all its calls together, one that is never called keeps what it
    has. Other layers run in eval mode (no dropout). The mode of every module is put back. All or nothing: after any
    error, or an interrupt, the statistics are those from before.

    Args:
        model: Changed in place, its moving statistics only. ``num_batches_tracked`` becomes the number of calls seen.
        batches: Inputs (N, ...), or sequences whose first item is the input, as a DataLoader yields (images, labels).
        device: Where to put each batch; None means the device of the model's first parameter.

    Returns:
        The number of layers whose statistics were replaced.

    Raises:
        DataError: No batches.
        FeedError: A batch leaves one value per channel to a BatchNorm, whose statistics are then undefined.
        ModelError: Values that are not finite reach a BatchNorm.
    """
    layers = _norm_layers(model)
    moments = {name: RunningMoments() for name in layers}
    where = device if device is not None else next((p.device for p in model.parameters()), None)
    with _statistics_kept(layers), _estimation_mode(model, layers), _watching(layers, moments), torch.no_grad():
        seen = 0
        for batch in batches:
            X = batch if isinstance(batch, Tensor) else batch[0]
            model(X.to(where) if where is not None else X)
            seen += 1
    if seen == 0:
        raise DataError("there are no batches to estimate moving statistics from", remedy="Give at least one batch")
    results = {name: found for name, found in moments.items() if found.calls}
    for name, found in results.items():
        _check_finite(name, found)
    for name, found in results.items():
        _store(layers[name], found)
    return len(results)


def _norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm layers that hold moving statistics, by path; a shared layer appears once."""
    return {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
        or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None)
    }


def _statistics(layer: nn.Module) -> list[Tensor]:
    """The buffers that hold statistics: mean, variance and torch's count of batches where there is one."""
    names = ("moving_mean", "moving_var", "running_mean", "running_var", "num_batches_tracked")
    return [buffer for name in names if (buffer := getattr(layer, name, None)) is not None]


@contextlib.contextmanager
def _statistics_kept(layers: dict[str, nn.Module]) -> Iterator[None]:
    """Undo what the forward passes in training mode do to the statistics."""
    before = {name: [buffer.clone() for buffer in _statistics(layer)] for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, layer in layers.items():
            for buffer, value in zip(_statistics(layer), before[name], strict=True):
                buffer.copy_(value)


@contextlib.contextmanager
def _estimation_mode(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """BatchNorm layers in training mode, all others in eval mode; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer in layers.values():
            layer.training = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _watching(layers: dict[str, nn.Module], moments: dict[str, RunningMoments]) -> Iterator[None]:
    """Add every input of every layer to its moments."""

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            X = args[0] if args else next(iter(kwargs.values()))
            count = X.numel() // max(X.shape[1], 1)
            if count < 2:
                raise FeedError(
                    f"a batch leaves {count} value(s) per channel to {name}, it needs at least 2",
                    remedy="Use larger batches, or drop the last partial one",
                )
            moments[name].add(X)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(name: str, found: RunningMoments) -> None:
    if not bool(torch.isfinite(found.mean).all() and torch.isfinite(found.squares).all()):
        raise ModelError(
            f"values that are not finite reach {name}, so its moving statistics can't be estimated",
            remedy="Check the weights and the images; a diverged training leaves such weights",
        )


def _store(layer: nn.Module, found: RunningMoments) -> None:
    mean, var, *counter = _statistics(layer)
    mean.copy_(found.mean)
    var.copy_(found.squares / found.count)
    for count in counter:
        count.fill_(found.calls)
