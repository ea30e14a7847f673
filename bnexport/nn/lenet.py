"""LeNet with batch normalization: "Dive into Deep Learning", section 8.5 (after LeCun et al., 1998).

This module loads torch only when a network is built, so that the command line can offer NORMS in its help.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bnexport.errors import UsageError
from bnexport.nn.statistics import SCRATCH, TORCH

if TYPE_CHECKING:
    from torch import Tensor, nn

#: The choices of normalization layer: torch's own, the one from scratch, and none for the ablation.
NORMS = ("torch", "scratch", "none")

#: Names in a state dict: torch's BatchNorm -> BatchNorm from scratch.
_NAMES = dict(zip(TORCH, SCRATCH, strict=True))


def bn_lenet(norm: str = "torch", *, in_channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """Build the network for (N, in_channels, 28, 28) images.

    The children are named conv1, bn1, sigmoid1, pool1, conv2, bn2, ..., fc3, the same for every norm; with ``"none"``
    the four bn layers are absent. Weights are drawn from torch's global generator, Xavier-uniform as in the chapter,
    biases as torch draws them; one seed gives one set of weights whatever the norm.

    Args:
        norm: One of NORMS.
        in_channels: Channels of the images.
        num_classes: Logits per image.

    Returns:
        The network in training mode; its output is (N, num_classes) logits.

    Raises:
        UsageError: The norm is unknown, or a number is below 1.
    """
    from torch import nn

    if norm not in NORMS:
        raise UsageError(f"the norm {norm!r} is unknown", remedy=f"Choose one of {', '.join(NORMS)}")
    if in_channels < 1 or num_classes < 1:
        raise UsageError(
            f"bn_lenet got in_channels={in_channels}, num_classes={num_classes}", remedy="Give at least 1 for both"
        )
    layers: list[tuple[str, nn.Module | None]] = [
        ("conv1", nn.Conv2d(in_channels, 6, kernel_size=5)),  # (N, 6, 24, 24)
        ("bn1", _norm(norm, 6, 4)),
        ("sigmoid1", nn.Sigmoid()),
        ("pool1", nn.AvgPool2d(kernel_size=2, stride=2)),  # (N, 6, 12, 12)
        ("conv2", nn.Conv2d(6, 16, kernel_size=5)),  # (N, 16, 8, 8)
        ("bn2", _norm(norm, 16, 4)),
        ("sigmoid2", nn.Sigmoid()),
        ("pool2", nn.AvgPool2d(kernel_size=2, stride=2)),  # (N, 16, 4, 4)
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(256, 120)),
        ("bn3", _norm(norm, 120, 2)),
        ("sigmoid3", nn.Sigmoid()),
        ("fc2", nn.Linear(120, 84)),
        ("bn4", _norm(norm, 84, 2)),
        ("sigmoid4", nn.Sigmoid()),
        ("fc3", nn.Linear(84, num_classes)),
    ]
    network = nn.Sequential(OrderedDict((name, layer) for name, layer in layers if layer is not None))
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return network


def _norm(norm: str, num_features: int, num_dims: int) -> nn.Module | None:
    from torch import nn

    from bnexport.nn.batch_norm import BatchNorm

    if norm == "none":
        return None
    if norm == "scratch":
        return BatchNorm(num_features, num_dims)
    return nn.BatchNorm2d(num_features) if num_dims == 4 else nn.BatchNorm1d(num_features)


def convert_weights(state_dict: Mapping[str, Tensor], *, to: str) -> dict[str, Tensor]:
    """Return a state dict for the same network with the other kind of BatchNorm: ``to`` "torch" or "scratch".

    Every group of entries with moving statistics is renamed; all others are passed on. Values are shared, not copied,
    and entries with the target's names stay. torch's count of batches has no counterpart in the scratch layer. It is
    dropped in the conversion to "scratch". In the conversion to "torch" it is 0 if the statistics are the initial ones,
    else 1.
    """
    if to not in ("torch", "scratch"):
        raise UsageError(f"weights can't be converted to {to!r}", remedy='Use to="torch" or to="scratch"')
    if to == "scratch":
        return _rename(state_dict, "running_mean", _NAMES)
    converted = _rename(state_dict, "moving_mean", {new: old for old, new in _NAMES.items()})
    for prefix in _prefixes(state_dict, "moving_mean"):
        converted[f"{prefix}num_batches_tracked"] = _batches_tracked(converted, prefix)
    return converted


def _rename(state_dict: Mapping[str, Tensor], marker: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename entries next to a ``marker`` entry, as vectors; drop torch's counters there."""
    prefixes = _prefixes(state_dict, marker)
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        prefix, name = _split(key)
        if prefix not in prefixes:
            renamed[key] = value
        elif name in names:
            renamed[prefix + names[name]] = value.reshape(-1)  # (C,) from the chapter's (1, C, 1, 1)
        elif name != "num_batches_tracked":
            renamed[key] = value
    return renamed


def _prefixes(state_dict: Mapping[str, Tensor], marker: str) -> tuple[str, ...]:
    return tuple(prefix for prefix, name in map(_split, state_dict) if name == marker)


def _split(key: str) -> tuple[str, str]:
    """Split ``"a.b.weight"`` into ``("a.b.", "weight")``."""
    prefix, dot, name = key.rpartition(".")
    return prefix + dot, name


def _batches_tracked(state_dict: Mapping[str, Tensor], prefix: str) -> Tensor:
    import torch

    mean, var = state_dict[f"{prefix}running_mean"], state_dict.get(f"{prefix}running_var")
    untouched = bool((mean == 0).all()) and (var is None or bool((var == 1).all()))
    return torch.tensor(0 if untouched else 1)
