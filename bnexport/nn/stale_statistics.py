"""How far moving statistics are from the exact ones of the same weights: stale statistics.

In training a BatchNorm normalises with its batch's own statistics; in eval mode, and after folding, with the moving ones,
an exponential average over batches that earlier weights made. Where the weights moved fast (a high learning rate), the
average is slow (a small momentum) or short (few steps), it is of a network that no longer exists. Nothing in training shows
it: only accuracy in eval mode falls.

With the exact mean m and variance v of a channel's inputs, and s = sqrt(v + eps) the deviation that it should be divided
by, three numbers tell how far the moving mean m' and variance v' (s' = sqrt(v' + eps)) are off:

- shift: (m' - m) / s, in standard deviations;
- scale: s' / s, by which the output is divided too much;
- error: the root mean square of what the layer's normalised output is off, (x - m) / s' + (m - m') / s' against
  (x - m) / s, over all inputs x: ``sqrt(((s / s' - 1) ** 2 * v + (m - m') ** 2 * (s / s') ** 2) / s ** 2)``. 0 is exact, 1 is
  as much as the output itself varies.

A layer's error is the root mean square over its channels, each weighted by gamma squared: what a dead channel is off can't
be seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.nn.moving_statistics import Batch, exact_moments, norm_layers, statistics_of

#: A layer's error above which statistics count as stale. docs/statistics.md has the runs that it was chosen on.
STALE_ABOVE = 0.25


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

    @property
    def stale(self) -> bool:
        """Whether the error is above STALE_ABOVE; one that is no number is."""
        return not self.error <= STALE_ABOVE

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        values = {key: value for key, value in vars(self).items() if key != "name"}
        finite = {key: value if value - value == 0.0 else None for key, value in values.items()}
        return {"name": self.name, **finite, "stale": self.stale}


@dataclass(frozen=True)
class StalenessReport:
    """Every BatchNorm layer that was called.

    Attributes:
        layers: In the order of the network.
        images: Inputs that the exact statistics were computed over.
        threshold: STALE_ABOVE when the report was made.
    """

    layers: tuple[LayerStaleness, ...]
    images: int
    threshold: float = STALE_ABOVE

    @property
    def worst(self) -> LayerStaleness | None:
        """The layer with the largest error; None for a network without BatchNorm."""
        return max(self.layers, key=lambda layer: (layer.stale, layer.error), default=None)

    @property
    def stale(self) -> bool:
        """Whether any layer's statistics are stale."""
        return any(layer.stale for layer in self.layers)

    def sentence(self) -> str:
        """The report in one sentence without its full stop."""
        if self.worst is None:
            return "the network has no moving statistics"
        most = f"{self.worst.name}'s output is off by {self.worst.error:.2g} of what it varies"
        if not self.stale:
            return f"the moving statistics are up to date on {self.images} training images: at most, {most}"
        return (
            f"the moving statistics are stale on {self.images} training images: {most} (up to {self.threshold:g} is usual);"
            " bnexport recalibrate re-estimates them"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "images": self.images,
            "threshold": self.threshold,
            "stale": self.stale,
            "layers": [layer.to_json() for layer in self.layers],
        }


def staleness(
    model: nn.Module, batches: Iterable[Batch], *, device: torch.device | str | None = None
) -> StalenessReport:
    """Compare moving statistics with the exact ones over some batches; the model is unchanged.

    One forward pass. The exact statistics are by the definition "batch" of ``nn.moving_statistics``: those that moving
    statistics are an average of. From n inputs the mean is known to about 1 / sqrt(n) standard deviations, so 1000 images
    are enough to tell an error of 0.25 from chance.

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
        compare(name, layers[name], moving=mean_and_var(layers[name]), exact=(moments.mean, moments.var))
        for name, moments in found.items()
    )
    return StalenessReport(rows, counted.images)


def mean_and_var(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A layer's moving mean and variance (channels,): the buffers themselves."""
    mean, var, *_ = statistics_of(layer)
    return mean, var


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
    name: str, layer: nn.Module, *, moving: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]
) -> LayerStaleness:
    """One layer's moving statistics against exact ones.

    Args:
        name: Its path.
        layer: A BatchNorm of torch or from scratch, for its gamma and eps.
        moving: Mean and variance (channels,).
        exact: Mean and population variance (channels,) of what reaches it.
    """
    moving_mean, moving_var, mean, var = (value.detach().double().cpu() for value in (*moving, *exact))
    eps = float(layer.eps)  # type: ignore[arg-type]  # every norm has one
    s, moving_s = torch.sqrt(var + eps), torch.sqrt(moving_var + eps)
    shift = (moving_mean - mean).abs() / s
    log_scale = torch.log(moving_s / s).abs()
    error = torch.sqrt((s / moving_s - 1) ** 2 * var / s**2 + (shift * s / moving_s) ** 2)
    weight = _gamma(layer, mean) ** 2
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


def _gamma(layer: nn.Module, like: Tensor) -> Tensor:
    gamma = getattr(layer, "gamma", None) if hasattr(layer, "gamma") else getattr(layer, "weight", None)
    return torch.ones_like(like) if gamma is None else gamma.detach().double().cpu()


def _rms(values: Tensor) -> Tensor:
    return torch.sqrt((values**2).mean())
