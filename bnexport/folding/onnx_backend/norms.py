"""Readers of a scale and a shift by constants: BatchNormalization, and plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bnexport.folding.affine import Affine, ChannelAffine, Dim, why_infinite
from bnexport.folding.graph import Norm, NormCall, Opaque
from bnexport.folding.onnx_backend.inventory import BATCH_NORM
from bnexport.folding.onnx_backend.view import NOT_AN_INPUT, OVERRIDABLE, Reading, View

#: First operator set whose BatchNormalization says that it is training by an attribute; before, by its outputs.
_TRAINING_MODE = 14
#: The operator's default, which is stored in float32.
_DEFAULT_EPSILON = float(torch.tensor(1e-5))


def read_batch_norm(view: View) -> Reading:
    """Read a BatchNormalization; one that can't be read has a row in the report all the same."""
    why, unlock = _unreadable(view)
    affine = None if why else _affine(view)
    rank = len(view.shape() or ())
    if affine is not None and not bool(torch.isfinite(affine.scale).all() and torch.isfinite(affine.shift).all()):
        var = view.context.constants.tensor(view.input(4))
        why, unlock = why_infinite(var, float(view.attribute("epsilon", _DEFAULT_EPSILON)))
        affine = None
    found = None if affine is None else affine.on_axis(1, rank)
    call = NormCall(view.name, BATCH_NORM, _channels(view), found, why, unlock)
    return Reading(Opaque(why) if found is None else Norm(found), (view.input(0),), call=call)


def unread_batch_norm(view: View, why: str, unlock: str) -> Reading:
    """Return the reading of a BatchNormalization that stays for a reason outside of it."""
    inputs = tuple(name for name in view.node.input if name)
    return Reading(Opaque(why), inputs, call=NormCall(view.name, BATCH_NORM, _channels(view), None, why, unlock))


def _unreadable(view: View) -> tuple[str, str]:
    """Return the reason why its affine can't be read, and a hint; two empty texts when it can."""
    training = view.attribute("training_mode", 0) if view.opset >= _TRAINING_MODE else len(view.outputs()) > 1
    shape = view.shape()
    indices = range(1, 5)
    names = {view.input(index) for index in indices}
    if training:
        return "it is in training mode, so it uses batch statistics", "the network exported in eval mode"
    if view.opset < 9 and view.attribute("spatial", 1) == 0:
        return "it has statistics for each position (spatial=0)", ""
    if names & view.context.constants.overridable:
        return OVERRIDABLE.replace("weights", "parameters"), NOT_AN_INPUT
    if not all(view.is_constant(index) for index in indices):
        return "its parameters are computed in the graph", "parameters and statistics stored as initializers"
    if shape is None or len(shape) < 2 or not view.is_floating:
        return "the file does not tell the shape of its input", "a file that shape inference can read"
    sizes = {view.context.constants.shape(view.input(index)) for index in indices}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1:
        return "its parameters have different lengths", ""
    return "", ""


def _affine(view: View) -> ChannelAffine:
    gamma, beta, mean, var = (view.context.constants.tensor(view.input(index)) for index in range(1, 5))
    return ChannelAffine.from_statistics(mean, var, float(view.attribute("epsilon", _DEFAULT_EPSILON)), gamma, beta)


def _channels(view: View) -> int:
    shape = view.shape()
    size = shape[1] if shape is not None and len(shape) > 1 else 0
    return size if isinstance(size, int) else 0


def read_arithmetic(view: View) -> Reading | None:
    """``x + c``, ``x - c``, ``c - x``, ``x * c``, ``x / c`` with a constant that does not enlarge the value."""
    if len(view.node.input) != 2 or not view.is_floating or view.is_constant(0) == view.is_constant(1):
        return None
    value = 1 if view.is_constant(0) else 0
    placed = placed_constant(view, 1 - value, view.shape(value))
    if placed is None:
        return None
    pair = _ELEMENTWISE[view.node.op_type](placed, value == 1)
    if pair is None or not bool(torch.isfinite(pair[0]).all() and torch.isfinite(pair[1]).all()):
        return None
    return Reading(Norm(Affine.of(*pair)), (view.input(value),))


def read_neg(view: View) -> Reading | None:
    """``-x``."""
    shape = view.shape()
    if shape is None or not view.is_floating:
        return None
    ones = torch.ones([1] * len(shape), dtype=torch.float64)
    return Reading(Norm(Affine(-ones, torch.zeros_like(ones))), (view.input(0),))


def placed_constant(view: View, index: int, shape: tuple[Dim, ...] | None) -> Tensor | None:
    """Return a constant input with as many axes as a value, float64; None when it would enlarge the value."""
    if shape is None or not shape:
        return None
    constant = view.context.constants.tensor(view.input(index))
    if constant.ndim > len(shape):
        return None
    placed = constant.reshape([*[1] * (len(shape) - constant.ndim), *constant.shape])
    fits = all(size == 1 or size == there for size, there in zip(placed.shape, shape, strict=True))
    return placed if fits else None


def _add(constant: Tensor, _constant_first: bool) -> tuple[Tensor, Tensor]:
    return torch.ones_like(constant), constant


def _sub(constant: Tensor, constant_first: bool) -> tuple[Tensor, Tensor]:
    if constant_first:  # c - x
        return -torch.ones_like(constant), constant
    return torch.ones_like(constant), -constant


def _mul(constant: Tensor, _constant_first: bool) -> tuple[Tensor, Tensor]:
    return constant, torch.zeros_like(constant)


def _div(constant: Tensor, constant_first: bool) -> tuple[Tensor, Tensor] | None:
    if constant_first:  # c / x is not affine
        return None
    return constant.reciprocal(), torch.zeros_like(constant)


_ELEMENTWISE: dict[str, Callable[[Tensor, bool], tuple[Tensor, Tensor] | None]] = {
    "Add": _add,
    "Sum": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
}
