"""Refusal of models that load but must not be shipped: broken weights, impossible or never-trained statistics."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from bnexport.errors import RefusedModel, UsageError
from bnexport.nn.batch_norm import BATCH_NORMS
from bnexport.nn.calling import call_once
from bnexport.nn.statistics import VOCABULARIES, NormView

_STATISTICS = {name for names in VOCABULARIES for name in names[2:]}
_VARIANCES = tuple(names[3] for names in VOCABULARIES)


def check_sound(model: nn.Module, *, allow_untrained: bool = False, allow_nonfinite: Collection[str] = ()) -> None:
    """Refuse a model whose outputs would be meaningless.

    Parameters and moving statistics must be finite, unless ``allow_nonfinite`` names a parameter with infinities. Another
    buffer may hold infinities, as the mask of an attention does; ``check_finite_output`` shows whether they reach an
    output. NaN is refused everywhere, except in buffers that ``allow_nonfinite`` names.

    Raises:
        RefusedModel: A tensor has no value (a lazy layer), is not finite or is a negative variance; or a BatchNorm was never
            trained or, in a model in eval mode, is in training mode. The error names the tensor or layer.
        UsageError: ``allow_nonfinite`` has a name without a tensor.
    """
    _check_names(model, allow_nonfinite)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise RefusedModel(
                f"{name} has no value yet",
                remedy="Run the network once on an example inside the factory, so that its lazy layers get their shapes",
            )
        _refuse_nonfinite(name, tensor, allowed=name in allow_nonfinite)
        if name.rpartition(".")[2] in _VARIANCES and bool((tensor < 0).any()):
            raise RefusedModel(
                f"{name} holds a negative variance ({_first(tensor < 0)})",
                remedy="A variance is never negative: the file is damaged or its tensors are mixed up",
            )
    for name, module in model.named_modules():
        if not model.training and isinstance(module, BATCH_NORMS) and module.training:
            raise RefusedModel(
                f"{name or 'the model'} is a {type(module).__name__} in training mode: its output for one sample depends"
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


def _check_names(model: nn.Module, names: Collection[str]) -> None:
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if unknown := sorted(set(names) - known):
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise UsageError(
            f"--allow-nonfinite {unknown[0]}: {type(model).__name__} has no parameter or buffer of that name",
            remedy=f"Did you mean {near[0]}?" if near else "Give the name as in named_parameters() or named_buffers()",
        )


def _refuse_nonfinite(name: str, tensor: Tensor, *, allowed: bool) -> None:
    if not _holds_nonfinite(tensor):
        return
    statistic, parameter = _is_statistic(name), isinstance(tensor, nn.Parameter)
    remedy = "The training diverged or the file is damaged: train again, if necessary with a lower learning rate"
    if bool(nan := torch.isnan(tensor).any()):
        accepted = allowed and not parameter and not statistic
        where = _first(torch.isnan(tensor))
        hint = "" if parameter or statistic else f"; if it is meant to hold NaN, pass --allow-nonfinite {name}"
    else:
        accepted = not statistic and (allowed or not parameter)
        where = _first(torch.isinf(tensor))
        hint = "" if statistic else f"; if it is meant to, as a mask is, pass --allow-nonfinite {name}"
    if not accepted:
        raise RefusedModel(f"{name} holds {'NaN' if nan else 'infinity'} ({where})", remedy=remedy + hint)


def _holds_nonfinite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in _STATISTICS


def has_diverged(model: nn.Module) -> bool:
    """Return True if a trained parameter or a moving statistic is not finite, or any tensor holds NaN."""
    return any(
        bool(torch.isnan(item).any())
        or (bool(torch.isinf(item).any()) and (_is_statistic(name) or bool(item.requires_grad)))
        for name, item in (*model.named_parameters(), *model.named_buffers())
        if item.is_floating_point()
    )


def check_finite_output(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse (RefusedModel) a model whose infinities reach an output on an example; a model of finite tensors is not run.

    A copy is run. A model that fails on the example passes, since the caller's next step reports it.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not (names := [name for name, item in tensors if _holds_nonfinite(item)]):
        return
    for output in pytree.tree_leaves(call_once(model, inputs).result):
        if isinstance(output, Tensor) and _holds_nonfinite(output):
            raise RefusedModel(
                f"{names[0]} holds infinity or NaN, and the network's output on an example is not finite",
                remedy="Repair that tensor; a mask must leave each row of the softmax a finite number",
            )


def is_untrained(module: nn.Module) -> bool:
    """Return True if a BatchNorm still has its initial statistics and has counted no batch."""
    view = NormView.of(module) if isinstance(module, BATCH_NORMS) else None
    if view is None or (view.batches is not None and int(view.batches) > 0):
        return False
    return bool((view.mean == 0).all()) and bool((view.var == 1).all())


def _first(mask: Tensor) -> str:
    """Return the first place where a mask is true: "at [3, 0]", or "as its value" for a scalar."""
    index = mask.nonzero()[0].tolist()
    return f"at {index}" if index else "as its value"
