"""Exact re-estimation of moving statistics from data.

An exponential average over the last few noisy batches is a poor estimate of the statistics that a network's weights
were trained with. Here they are computed over a whole set of inputs instead, with the final weights.

The inputs of a layer depend on the layers before it. So there are two definitions of its statistics:

batch
    "Precise BatchNorm" (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3). The data pass through the
    network once. Every BatchNorm normalises each batch with that batch's own statistics, as it did in training, so all
    layers are estimated in one pass and none depends on old moving statistics. The result is exact for the inputs that
    layers see in training. The division of the data into batches has no effect on the first layer and a small effect on
    deeper layers.
population
    Layer by layer: a layer's inputs are those in eval mode, when every layer before it has its exact statistics already.
    This takes one pass per layer. The size, order and mixture of the batches have no effect, and the result is
    consistent: the statistics of the network's own inputs in eval mode. A layer that is called several times in one
    forward pass has no such order. It normalises with its batch's statistics during its pass, so for this layer the size
    of the batches has an effect.

Per layer and channel the mean and the population variance are those of ALL values that reached the layer: batch
variances and the spread of the batch means together (law of total variance), so batches count by their size. They are
kept in float64 as (count, mean, sum of squared deviations) and merged by the formula of Chan, Golub and LeVeque (1979).
So memory is constant in the number of batches, their order changes the result by rounding only, and a mean that is
large compared with the deviation costs no digits.

The forward passes run in strict float32, also on a GPU whose training steps round to TF32.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.errors import DataError, FeedError, ModelError
from bnexport.nn.batch_norm import BATCH_NORMS
from bnexport.nn.calling import to_eval_mode
from bnexport.nn.statistics import NormView
from bnexport.reproducibility import strict_float32

#: A batch of inputs, or a sequence whose first item is one, as a DataLoader yields (images, labels).
Batch = Tensor | Sequence[Any]


class RunningMoments:
    """Count, mean and sum of squared deviations per channel of all values added so far, in float64."""

    def __init__(self) -> None:
        self.count = 0  # Values per channel
        self.calls = 0  # Number of calls of ``add``
        self.mean = torch.zeros(1, dtype=torch.float64)  # (channels,)
        self.squares = torch.zeros(1, dtype=torch.float64)  # (channels,), the sum of ``(value - mean) ** 2``

    @property
    def var(self) -> Tensor:
        """The population variance (channels,)."""
        return self.squares / self.count

    def add(self, X: Tensor) -> None:
        """Add a batch (N, C) or (N, C, ...).

        The batch's deviations are summed in two passes, corrected by the rounding error of the mean (Chan, Golub and LeVeque,
        "Algorithms for computing the sample variance", 1983). torch's single pass has an error of eps * mean / deviation.
        """
        count = X.numel() // X.shape[1]
        dims, shape = [dim for dim in range(X.dim()) if dim != 1], (1, -1, *[1] * (X.dim() - 2))
        wide = X.double()
        mean = wide.mean(dims)
        deviations = wide - mean.view(shape)
        drift = deviations.mean(dims)
        squares = (deviations**2).sum(dims) - count * drift**2
        total, delta = self.count + count, mean + drift - self.mean.to(mean.device)
        self.mean = self.mean.to(mean.device) + delta * (count / total)
        self.squares = self.squares.to(mean.device) + squares + delta**2 * (self.count * count / total)
        self.count = total
        self.calls += 1


def recalibrate(model: nn.Module, batches: Iterable[Batch], *, device: torch.device | str | None = None) -> int:
    """Replace the moving statistics of every BatchNorm by the exact ones over ``batches``, by the definition "batch".

    Works on ``nn.BatchNorm1d/2d/3d`` with moving statistics and on ``BatchNorm`` from scratch. A layer that is called
    several times in one forward pass gets the statistics of all its calls; a layer without a call keeps its statistics.
    Other layers run in eval mode (no dropout). The mode of every module is restored. After an error or an interrupt no
    statistics are changed.

    Args:
        model: Changed in place, its moving statistics only. ``num_batches_tracked`` becomes the number of calls seen.
        batches: Inputs (N, ...), or sequences whose first item is the input.
        device: Device of each batch; None means that of the model's first parameter.

    Returns:
        The number of layers whose statistics were replaced.

    Raises:
        DataError: There are no batches.
        FeedError: A batch leaves one value per channel to a BatchNorm, whose statistics are then undefined.
        ModelError: Values that are not finite reach a BatchNorm.
    """
    return _store_all(norm_layers(model), exact_moments(model, batches, device=device))


def recalibrate_by_layer(
    model: nn.Module, batches: Callable[[], Iterable[Batch]], *, device: torch.device | str | None = None
) -> int:
    """Replace the moving statistics of every BatchNorm by the exact ones, by the definition "population".

    ``batches`` is called once per layer and once before, and returns the same batches each time. Everything else is as in
    ``recalibrate``; a batch may leave one value per channel to a layer that is called once. The first batch shows which
    layers are called, and in which order.
    """
    layers = norm_layers(model)
    results: dict[str, RunningMoments] = {}
    with _statistics_kept(layers):
        order = _calls(model, layers, batches(), device)
        for name, calls in order.items():
            layer = layers[name]
            results |= _pass({name: layer}, model, batches(), device, training=[layer.layer] if calls > 1 else [])
            _store(layer, results[name])
    return _store_all(layers, results)


def exact_moments(
    model: nn.Module, batches: Iterable[Batch], *, device: torch.device | str | None = None
) -> dict[str, RunningMoments]:
    """Return the exact statistics of every BatchNorm that is called, by path, by the definition "batch".

    The parameters and errors are those of ``recalibrate``, but the model is not changed.
    """
    layers = norm_layers(model)
    with _statistics_kept(layers):
        return _pass(layers, model, batches, device, training=[layer.layer for layer in layers.values()])


def _pass(
    watched: dict[str, NormView],
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str | None,
    *,
    training: Sequence[nn.Module],
) -> dict[str, RunningMoments]:
    """Return the moments of the inputs of called, watched layers, over one pass with some layers in training mode."""
    moments = {name: RunningMoments() for name in watched}
    where = device if device is not None else next((p.device for p in model.parameters()), None)
    seen = 0
    with strict_float32(), _estimation_mode(model, training), _watching(watched, moments), torch.no_grad():
        for batch in batches:
            X = batch if isinstance(batch, Tensor) else batch[0]
            model(X.to(where) if where is not None else X)
            seen += 1
    if seen == 0:
        raise DataError("there are no batches to estimate moving statistics from", remedy="Give at least one batch")
    called = {name: found for name, found in moments.items() if found.calls}
    for name, found in called.items():
        if not bool(torch.isfinite(found.mean).all() and torch.isfinite(found.squares).all()):
            raise ModelError(
                f"values that are not finite reach {name}, so its moving statistics can't be estimated",
                remedy="Check the weights and the images; a diverged training leaves such weights",
            )
    return called


def _calls(
    model: nn.Module, layers: dict[str, NormView], batches: Iterable[Batch], device: torch.device | str | None
) -> dict[str, int]:
    """Return the calls per forward pass of each called layer, in the order of first calls, from the first batch."""
    calls: dict[str, int] = {}

    def count(name: str, *_: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    with _before_calls(layers, count):
        _pass({}, model, itertools.islice(batches, 1), device, training=[])
    return calls


def norm_layers(model: nn.Module) -> dict[str, NormView]:
    """Return the BatchNorm layers that hold moving statistics, by path; a shared layer appears once."""
    return {
        name or type(module).__name__: view
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and (view := NormView.of(module)) is not None
    }


@contextlib.contextmanager
def _statistics_kept(layers: dict[str, NormView]) -> Iterator[None]:
    """Restore the statistics, which forward passes in training mode change."""
    before = {name: [buffer.clone() for buffer in layer.statistics] for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, layer in layers.items():
            for buffer, value in zip(layer.statistics, before[name], strict=True):
                buffer.copy_(value)


@contextlib.contextmanager
def _estimation_mode(model: nn.Module, training: Sequence[nn.Module]) -> Iterator[None]:
    """Put some BatchNorm layers in training mode and all other modules in eval mode; restore the modes after the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        to_eval_mode(model)
        for layer in training:
            layer.training = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _watching(layers: dict[str, NormView], moments: dict[str, RunningMoments]) -> AbstractContextManager[None]:
    """Add every input of every layer to its moments, inside the block."""

    def add(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        X = args[0] if args else next(iter(kwargs.values()))
        count = X.numel() // max(X.shape[1], 1)
        if count < 2 and layer.training:
            raise FeedError(
                f"a batch leaves {count} value(s) per channel to {name}, but it needs at least 2",
                remedy="Use larger batches, or drop the last partial one",
            )
        moments[name].add(X)

    return _before_calls(layers, add)


@contextlib.contextmanager
def _before_calls(layers: dict[str, NormView], hook: Callable[..., None]) -> Iterator[None]:
    """Call a function with a layer's name, the layer and its arguments before each call of the layer, inside the block."""
    handles = [
        layer.layer.register_forward_pre_hook(functools.partial(hook, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _store_all(layers: dict[str, NormView], results: dict[str, RunningMoments]) -> int:
    for name, found in results.items():
        _store(layers[name], found)
    return len(results)


def _store(layer: NormView, found: RunningMoments) -> None:
    layer.mean.copy_(found.mean)
    layer.var.copy_(found.var)
    if layer.batches is not None:
        layer.batches.fill_(found.calls)
