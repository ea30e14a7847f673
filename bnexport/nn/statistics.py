"""The numbers in BatchNorm layers, channel by channel, by the names of ``torch.nn`` or of the layer from scratch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bnexport.errors import ModelError
from bnexport.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

    Values = Tensor | Array

#: Names of gamma, beta, the moving mean and the moving variance.
TORCH = ("weight", "bias", "running_mean", "running_var")
SCRATCH = ("gamma", "beta", "moving_mean", "moving_var")
VOCABULARIES = (SCRATCH, TORCH)


@dataclass(frozen=True)
class NormView:
    """A layer with moving statistics, under any of the known names of its tensors (channels,).

    Each access reads the layer again, because moving a module to a device replaces its buffers. Writing into a tensor changes
    the layer.
    """

    layer: nn.Module  # The layer itself
    names: tuple[str, str, str, str]  # One of VOCABULARIES

    @classmethod
    def of(cls, layer: nn.Module) -> NormView | None:
        """Return the view of a layer; None if the layer has no moving statistics."""
        for names in VOCABULARIES:
            if hasattr(layer, "eps") and all(getattr(layer, name, None) is not None for name in names[2:]):
                return cls(layer, names)
        return None

    @property
    def gamma(self) -> Tensor | None:
        """The learned scale; None without one."""
        return cast("Tensor | None", self._read(self.names[0]))

    @property
    def beta(self) -> Tensor | None:
        """The learned shift; None without one."""
        return cast("Tensor | None", self._read(self.names[1]))

    @property
    def mean(self) -> Tensor:
        """The moving mean."""
        return cast("Tensor", self._read(self.names[2]))

    @property
    def var(self) -> Tensor:
        """The moving variance."""
        return cast("Tensor", self._read(self.names[3]))

    @property
    def eps(self) -> float:
        """The number added to the variance."""
        return float(self._read("eps"))

    @property
    def batches(self) -> Tensor | None:
        """The counter of training batches; None for layers from scratch."""
        return cast("Tensor | None", self._read("num_batches_tracked"))

    @property
    def statistics(self) -> list[Tensor]:
        """The buffers that training changes: mean, variance and, if present, the counter."""
        return [self.mean, self.var, *([] if self.batches is None else [self.batches])]

    def _read(self, name: str) -> Any:
        return getattr(self.layer, name, None)


def eps_of(model: nn.Module) -> dict[str, float]:
    """Return path -> eps of each layer with moving statistics, in the network's order; a state dict does not contain eps."""
    named = model.named_modules(remove_duplicate=False)  # a state dict has a shared layer under each of its names
    return {name: view.eps for name, layer in named if (view := NormView.of(layer)) is not None}


_COLUMNS = (*SCRATCH, "scale")
#: eps for a state dict without its network, since a state dict does not contain it: the default of torch and of the chapter.
DEFAULT_EPS = 1e-5
#: A channel whose output varies less than this, relative to the layer's most variable channel, carries no information.
DEAD_BELOW = 1e-3
#: A channel that is scaled this many times more than the layer's median channel amplifies noise, TF32's and fp16's too.
#: Dead channels are left out of the median.
EXPLODING_ABOVE = 30.0


@dataclass(frozen=True)
class Channel:
    """One channel of one BatchNorm."""

    gamma: float  # Learned scale
    beta: float  # Learned shift
    moving_mean: float  # Moving mean of the layer's input
    moving_var: float  # Moving variance of the layer's input
    scale: float  # gamma / sqrt(moving_var + eps), by which folding multiplies the layer before
    mark: str  # "dead", "exploding", "not finite" or ""


@dataclass(frozen=True)
class LayerStatistics:
    """One BatchNorm layer."""

    name: str  # Path of the layer in the network
    eps: float  # Number added to the variance
    channels: tuple[Channel, ...]  # Every channel in order

    def marked(self, mark: str) -> list[int]:
        """Return the indices of the channels with a mark."""
        return [index for index, channel in enumerate(self.channels) if channel.mark == mark]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; numbers that are not finite become None."""
        rows = [
            {
                key: value if isinstance(value, str) or math.isfinite(value) else None
                for key, value in vars(item).items()
            }
            for item in self.channels
        ]
        return {"name": self.name, "eps": self.eps, "channels": rows}


def layer_statistics(state: Mapping[str, Values], *, eps: Mapping[str, float] | None = None) -> list[LayerStatistics]:
    """Read every BatchNorm of a state dict; ``eps`` is the result of ``eps_of``, if known, else DEFAULT_EPS is assumed.

    A channel is marked *dead* when its output hardly varies (|gamma| * sqrt(var / (var + eps)) below 1/1000 of the
    layer's largest), *exploding* when its scale is over 30 times the median of the layer's channels that are not dead,
    and *not finite* when a number is NaN or infinite or the variance negative. ModelError if a layer's tensors differ in size.
    """
    known = eps or {}
    return [
        _layer(prefix, names, state, known.get(prefix.rstrip("."), DEFAULT_EPS)) for prefix, names in _groups(state)
    ]


def _groups(state: Mapping[str, Values]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield prefix and entry names of each layer that has moving statistics."""
    for key in state:
        prefix, dot, leaf = key.rpartition(".")
        for names in VOCABULARIES:
            if leaf == names[2] and prefix + dot + names[3] in state:
                yield prefix + dot, names


def _layer(prefix: str, names: tuple[str, ...], state: Mapping[str, Values], eps: float) -> LayerStatistics:
    mean, var = (_numbers(state[prefix + name]) for name in names[2:])
    gamma = _numbers(state[prefix + names[0]]) if prefix + names[0] in state else np.ones_like(mean)
    beta = _numbers(state[prefix + names[1]]) if prefix + names[1] in state else np.zeros_like(mean)
    if len({column.size for column in (mean, var, gamma, beta)}) != 1:
        raise ModelError(
            f"the tensors of {prefix.rstrip('.')} differ in size", remedy="The file is damaged: write it again"
        )
    with np.errstate(all="ignore"):  # numbers that are not finite get a mark below
        scale = gamma / np.sqrt(var + eps)
        liveliness = np.abs(gamma) * np.sqrt(var / (var + eps))
    columns = (gamma, beta, mean, var, scale)
    finite = np.isfinite(columns).all(axis=0) & (var >= 0)
    largest = float(liveliness[finite].max()) if finite.any() else 0.0
    live = finite & (liveliness > DEAD_BELOW * largest)  # dead channels would draw a pruned layer's median to 0
    median = float(np.median(np.abs(scale[live]))) if live.any() else 0.0
    channels = []
    for index in range(mean.size):
        if not finite[index]:
            mark = "not finite"
        elif not live[index]:
            mark = "dead"
        elif abs(float(scale[index])) > EXPLODING_ABOVE * median:
            mark = "exploding"
        else:
            mark = ""
        numbers = dict(zip(_COLUMNS, (float(column[index]) for column in columns), strict=True))
        channels.append(Channel(**numbers, mark=mark))
    return LayerStatistics(prefix.rstrip("."), eps, tuple(channels))


def _numbers(values: Values) -> Array:
    """Return a tensor or an array as float64 (channels,)."""
    array = values if isinstance(values, np.ndarray) else values.detach().double().cpu().numpy()
    return array.astype(np.float64).reshape(-1)
