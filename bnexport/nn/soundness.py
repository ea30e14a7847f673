"""Models that load but must not be shipped: broken weights, impossible or never-trained statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnexport.errors import RefusedModel
from bnexport.nn.batch_norm import BATCH_NORMS
from bnexport.nn.statistics import VOCABULARIES, NormView

_VARIANCES = tuple(names[3] for names in VOCABULARIES)


def check_sound(model: nn.Module, *, allow_untrained: bool = False) -> None:
    """Refuse a model whose outputs would be nonsense.

    Args:
        model: Any module; read only.
        allow_untrained: Accept BatchNorm layers that still have the statistics they were created with.

    Raises:
        RefusedModel: Naming the tensor: without a value (a lazy layer), not finite, a negative variance, or a BatchNorm
            that was never trained or, in a model in eval mode, is in training mode.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise RefusedModel(
                f"{name} has no value yet",
                remedy="Run the network once on an example inside the factory, so that its lazy layers get their shapes",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            what = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            raise RefusedModel(
                f"{name} holds {what} ({_first(~torch.isfinite(tensor))})",
                remedy="The training diverged or the file is damaged: train again, with a lower learning rate if need be",
            )
        if name.rpartition(".")[2] in _VARIANCES and bool((tensor < 0).any()):
            raise RefusedModel(
                f"{name} holds a negative variance ({_first(tensor < 0)})",
                remedy="A variance is never negative: the file is damaged or its tensors are mixed up",
            )
    for name, module in model.named_modules():
        if not model.training and isinstance(module, BATCH_NORMS) and module.training:
            raise RefusedModel(
                f"{name or 'the model'} is a {type(module).__name__} in training mode: what it gives for one sample depends"
                " on the others in the batch",
                remedy="Call eval() on it, so that it uses its moving statistics",
            )
    if not allow_untrained:
        for name, module in model.named_modules():
            if is_untrained(module):
                raise RefusedModel(
                    f"{name or 'the model'} is a {type(module).__name__} that was never trained (its moving mean is 0 and"
                    " its moving variance 1 in every channel)",
                    remedy="Load trained weights with --weights, or pass --allow-untrained if that is what you want",
                )


def is_untrained(module: nn.Module) -> bool:
    """Return whether a BatchNorm still has its initial statistics and has counted no batch."""
    view = NormView.of(module) if isinstance(module, BATCH_NORMS) else None
    if view is None or (view.batches is not None and int(view.batches) > 0):
        return False
    return bool((view.mean == 0).all()) and bool((view.var == 1).all())


def _first(mask: Tensor) -> str:
    """Return the first place where a mask is true: "at [3, 0]", or "as its value" for a scalar."""
    index = mask.nonzero()[0].tolist()
    return f"at {index}" if index else "as its value"
