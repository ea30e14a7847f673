"""Parts of a network that ``fold_modules`` folded: the remaining part of a norm, and the mark in the state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

#: The buffer of a folded network that states what was folded: JSON in UTF-8, as bytes. A state dict that holds it does not
#: load into an unfolded network.
MARKER = "bnexport_folded"


class ScaleShift(nn.Module):
    """``weight * x + bias``, broadcast over x: the remaining part of a norm, the same in training and in eval mode.

    None is a scale of one, or a shift of zero.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift a value of any shape that the two tensors fit."""
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias


def is_folded(model: nn.Module | Mapping[str, Any]) -> bool:
    """Return True if a network, or a part of it, was folded by ``fold_modules``.

    Example:
        >>> import bnexport, torch
        >>> folded = bnexport.fold_modules(bnexport.bn_lenet().eval(), torch.randn(2, 1, 28, 28)).model
        >>> bnexport.is_folded(folded), bnexport.is_folded(folded.state_dict()), bnexport.is_folded(bnexport.bn_lenet())
        (True, True, False)

    Args:
        model: A module, or a state dict with any prefix.
    """
    names = [name for name, _ in model.named_buffers()] if isinstance(model, nn.Module) else list(model)
    return any(name.rpartition(".")[2] == MARKER for name in names)
