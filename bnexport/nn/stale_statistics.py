"""Stale statistics: the distance of moving statistics from the exact ones of the same weights.

In training a BatchNorm normalises with its batch's own statistics; in eval mode, and after folding, with the moving ones,
an exponential average over batches under earlier weights. If the weights moved fast (a high learning rate), or the average
is slow (a small momentum) or short (few steps), it describes a network that no longer exists. No number of the training
shows this: only accuracy in eval mode falls.

m and v are the exact mean and variance of a channel's inputs, and s = sqrt(v + eps) is the deviation to divide by. Three
numbers measure the error of the moving mean m' and variance v' (s' = sqrt(v' + eps)):

- shift: (m' - m) / s, in standard deviations;
- scale: s' / s, the factor by which the output is too small;
- error: the root mean square error of the layer's normalised output, (x - m) / s' + (m - m') / s' against
  (x - m) / s, over all inputs x: ``sqrt(((s / s' - 1) ** 2 * v + (m - m') ** 2 * (s / s') ** 2) / s ** 2)``. 0 is exact, 1 is
  the standard deviation of the output itself.

A layer's error is the root mean square over its channels, each weighted by gamma squared, because the error of a dead
channel has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.nn.moving_statistics import Batch, exact_moments, norm_layers
from bnexport.nn.statistics import NormView

#: A layer's error above which statistics count as stale: in the runs of docs/statistics.md those below lost at most 1.6 points
#: of accuracy, those above up to 67. Training with a learning rate of 0.01 stays below 0.05.
STALE_ABOVE = 0.15
#: Sampling alone changes exact statistics by about 1 / sqrt(images); with few images only a larger error is significant.
_SAMPLING = 3.0


@dataclass(frozen=True)
class LayerStaleness:
    """One BatchNorm layer."""

    name: str  # Path of the layer in the network
    shift: float  # Root mean square over channels of the moving mean's error, in standard deviations
    worst_shift: float  # The largest shift of a channel
    # Root mean square over channels of ``ln(s' / s)``, as a factor: 1 is exact, 1.1 is 10 % off either way
    scale: float
    worst_scale: float  # The largest factor of a channel
    error: float  # Root mean square error of the layer's output, as a share of its standard deviation
    worst_error: float  # The largest error of a channel that is not dead

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; numbers that are not finite become None."""
        values = {key: value for key, value in vars(self).items() if key != "name"}
        return {"name": self.name, **{key: value if math.isfinite(value) else None for key, value in values.items()}}


@dataclass(frozen=True)
class StalenessReport:
    """Every BatchNorm layer that was called."""

    layers: tuple[LayerStaleness, ...]  # Layers in the order of the network
    images: int  # Number of inputs for the exact statistics

    @property
    def threshold(self) -> float:
        """The error above which a layer is stale: STALE_ABOVE, or more for few images."""
        return max(STALE_ABOVE, _SAMPLING / math.sqrt(max(self.images, 1)))

    def is_stale(self, layer: LayerStaleness) -> bool:
        """Return True if a layer's error is above the threshold, or NaN."""
        return not layer.error <= self.threshold

    @property
    def worst(self) -> LayerStaleness | None:
        """The layer with the largest error; None for a network without BatchNorm."""
        return max(self.layers, key=lambda layer: math.inf if math.isnan(layer.error) else layer.error, default=None)

    @property
    def stale(self) -> bool:
        """True if any layer's statistics are stale."""
        return any(map(self.is_stale, self.layers))

    def sentence(self, *, remedy: str = "bnexport recalibrate re-estimates them") -> str:
        """Return the report as one sentence without its full stop; ``remedy`` is that for stale statistics."""
        if self.worst is None:
            return "the network has no moving statistics"
        most = f"{self.worst.name}'s output is off by {self.worst.error:.2g} of its standard deviation"
        if not self.stale:
            return f"the moving statistics are up to date on {self.images} training images: at most, {most}"
        return (
            f"the moving statistics are stale on {self.images} training images: {most}, and above {self.threshold:.2g} that"
            f" may cost accuracy; {remedy}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "images": self.images,
            "threshold": self.threshold,
            "stale": self.stale,
            "layers": [{**layer.to_json(), "stale": self.is_stale(layer)} for layer in self.layers],
        }


def staleness(
    model: nn.Module, batches: Iterable[Batch], *, device: torch.device | str | None = None
) -> StalenessReport:
    """Compare moving statistics with the exact ones over some batches; the model is unchanged.

    This takes one forward pass. The exact statistics are by the definition "batch" of ``nn.moving_statistics``, because
    moving statistics are an average of these. From n inputs the mean is known to about 1 / sqrt(n) standard deviations, so
    1000 images are enough to distinguish an error of 0.15 from chance. ``batches`` are mixed inputs of the training set, of the
    size used in training. Errors are those of ``nn.moving_statistics.recalibrate``.
    """
    images = 0

    def counted() -> Iterator[Batch]:
        nonlocal images
        for batch in batches:
            images += len(batch if isinstance(batch, Tensor) else batch[0])
            yield batch

    layers = norm_layers(model)
    found = exact_moments(model, counted(), device=device)
    rows = tuple(
        compare(name, layers[name], moving=(layers[name].mean, layers[name].var), exact=(moments.mean, moments.var))
        for name, moments in found.items()
    )
    return StalenessReport(rows, images)


def compare(
    name: str, layer: NormView, *, moving: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]
) -> LayerStaleness:
    """Compare one layer's moving mean and variance (channels,) with the exact mean and population variance of its inputs."""
    moving_mean, moving_var, mean, var = (value.detach().double().cpu() for value in (*moving, *exact))
    s, moving_s = torch.sqrt(var + layer.eps), torch.sqrt(moving_var + layer.eps)
    shift = (moving_mean - mean).abs() / s
    log_scale = torch.log(moving_s / s).abs()
    error = torch.sqrt((s / moving_s - 1) ** 2 * var / s**2 + (shift * s / moving_s) ** 2)
    weight = torch.ones_like(mean) if layer.gamma is None else layer.gamma.detach().double().cpu() ** 2
    live = weight > 0
    return LayerStaleness(
        name,
        float(_rms(shift)),
        float(shift.max()),
        float(torch.exp(_rms(log_scale))),
        float(torch.exp(log_scale.max())),
        float(torch.sqrt((weight * error**2)[live].sum() / weight[live].sum())) if bool(live.any()) else 0.0,
        float(error[live].max()) if bool(live.any()) else 0.0,
    )


def _rms(values: Tensor) -> Tensor:
    return torch.sqrt((values**2).mean())
