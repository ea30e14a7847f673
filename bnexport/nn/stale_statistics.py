"""Stale statistics: the distance of moving statistics from the exact ones of the same weights.

In training a BatchNorm normalises with its batch's own statistics; in eval mode, and after folding, with the moving ones,
an exponential average over batches that earlier weights made. Where the weights moved fast (a high learning rate), the
average is slow (a small momentum) or short (few steps), it is of a network that no longer exists. Nothing in training shows
it: only accuracy in eval mode falls.

With the exact mean m and variance v of a channel's inputs, and s = sqrt(v + eps) the deviation that it should be divided
by, three numbers measure how far the moving mean m' and variance v' (s' = sqrt(v' + eps)) are off:

- shift: (m' - m) / s, in standard deviations;
- scale: s' / s, by which the output is divided too much;
- error: the root mean square of what the layer's normalised output is off, (x - m) / s' + (m - m') / s' against
  (x - m) / s, over all inputs x: ``sqrt(((s / s' - 1) ** 2 * v + (m - m') ** 2 * (s / s') ** 2) / s ** 2)``. 0 is exact, 1 is
  as much as the output itself varies.

A layer's error is the root mean square over its channels, each weighted by gamma squared: what a dead channel is off can't
be seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.nn.moving_statistics import Batch, exact_moments, norm_layers
from bnexport.nn.statistics import NormView

#: A layer's error above which statistics count as stale: in the runs of docs/statistics.md those below lost at most 1.6 points
#: of accuracy, those above up to 67. Training with a learning rate of 0.01 stays below 0.05.
STALE_ABOVE = 0.15
#: Sampling alone moves exact statistics by about 1 / sqrt(images); with few images only a larger error is significant.
_SAMPLING = 3.0


@dataclass(frozen=True)
class LayerStaleness:
    """One BatchNorm layer.

    Attributes:
        name: Its path in the network.
        shift: Root mean square over channels of the moving mean's distance, in standard deviations.
        worst_shift: The largest.
        scale: Root mean square over channels of ``ln(s' / s)``, as a factor: 1 is exact, 1.1 is 10 % off either way.
        worst_scale: The largest such factor.
        error: Root mean square of what the layer's output is off, as a share of what it varies.
        worst_error: The largest of any channel that is not dead.
    """

    name: str
    shift: float
    worst_shift: float
    scale: float
    worst_scale: float
    error: float
    worst_error: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        values = {key: value for key, value in vars(self).items() if key != "name"}
        return {"name": self.name, **{key: value if math.isfinite(value) else None for key, value in values.items()}}


@dataclass(frozen=True)
class StalenessReport:
    """Every BatchNorm layer that was called.

    Attributes:
        layers: In the order of the network.
        images: Inputs that the exact statistics were computed over.
    """

    layers: tuple[LayerStaleness, ...]
    images: int

    @property
    def threshold(self) -> float:
        """The error above which a layer is stale: STALE_ABOVE, or more where few images leave more to chance."""
        return max(STALE_ABOVE, _SAMPLING / math.sqrt(max(self.images, 1)))

    def is_stale(self, layer: LayerStaleness) -> bool:
        """Return whether a layer's error is above the threshold, or NaN."""
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
        """The report in one sentence without its full stop.

        Args:
            remedy: What to do about stale ones.
        """
        if self.worst is None:
            return "the network has no moving statistics"
        most = f"{self.worst.name}'s output is off by {self.worst.error:.2g} of what it varies"
        if not self.stale:
            return f"the moving statistics are up to date on {self.images} training images: at most, {most}"
        return (
            f"the moving statistics are stale on {self.images} training images: {most}, and above {self.threshold:.2g} that"
            f" may cost accuracy; {remedy}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
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

    One forward pass. The exact statistics are by the definition "batch" of ``nn.moving_statistics``: those that moving
    statistics are an average of. From n inputs the mean is known to about 1 / sqrt(n) standard deviations, so 1000 images
    are enough to distinguish an error of 0.15 from chance.

    Args:
        model: With BatchNorm layers in any mode.
        batches: As for ``nn.moving_statistics.recalibrate``; of the training set, mixed, of the size used in training.
        device: Where to put each batch; None means the device of the model's first parameter.

    Raises:
        DataError: No batches.
        FeedError: A batch leaves one value per channel to a BatchNorm.
        ModelError: Values that are not finite reach a BatchNorm.
    """
    counted = _Counted(batches)
    layers = norm_layers(model)
    found = exact_moments(model, counted, device=device)
    rows = tuple(
        compare(name, layers[name], moving=(layers[name].mean, layers[name].var), exact=(moments.mean, moments.var))
        for name, moments in found.items()
    )
    return StalenessReport(rows, counted.images)


class _Counted:
    """Batches that count their inputs while they are read."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.images = 0

    def __iter__(self) -> Any:
        for batch in self._batches:
            self.images += len(batch if isinstance(batch, Tensor) else batch[0])
            yield batch


def compare(
    name: str, layer: NormView, *, moving: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]
) -> LayerStaleness:
    """One layer's moving statistics against exact ones.

    Args:
        name: Its path.
        layer: For its gamma and eps.
        moving: Mean and variance (channels,).
        exact: Mean and population variance (channels,) of what reaches it.
    """
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
