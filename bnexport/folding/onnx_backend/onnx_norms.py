"""Readers of a scale and a shift by constants: BatchNormalization, and plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnexport.folding.affine import Affine, ChannelAffine, Dim, arithmetic, is_finite, placed_on, why_infinite
from bnexport.folding.graph import ConstantAffine, NormCall, Opaque
from bnexport.folding.onnx_backend.inventory import BATCH_NORM
from bnexport.folding.onnx_backend.view import OVERRIDABLE, NodeView, OnnxReading

#: First operator set whose BatchNormalization has an attribute for training mode; before, its outputs show it.
_TRAINING_MODE = 14
#: Reason of a norm whose input has no known shape.
UNKNOWN_SHAPE = "the file does not state the shape of its input"
#: The operator's default, which is stored in float32.
_DEFAULT_EPSILON = float(torch.tensor(1e-5))


def read_batch_norm(view: NodeView) -> OnnxReading:
    """Read a BatchNormalization; one that can't be read still has a row in the report."""
    why, hint = _unreadable(view)
    found = None
    if not why:
        gamma, beta, mean, var = (view.context.constants.tensor(view.input(index)) for index in range(1, 5))
        eps = float(view.attribute("epsilon", _DEFAULT_EPSILON))
        affine = ChannelAffine.from_statistics(mean, var, eps, gamma, beta)
        if is_finite(affine):
            found = affine.on_axis(1, len(view.shape() or ()))
        else:
            why, hint = why_infinite(var, eps)
    call = NormCall(view.name, BATCH_NORM, _channels(view), found, why, hint)
    return OnnxReading(Opaque(why) if found is None else ConstantAffine(found), (view.input(0),), call=call)


def unread_batch_norm(view: NodeView, why: str, hint: str) -> OnnxReading:
    """Return the reading of a BatchNormalization that stays for a reason outside of the node."""
    inputs = tuple(name for name in view.node.input if name)
    return OnnxReading(Opaque(why), inputs, call=NormCall(view.name, BATCH_NORM, _channels(view), None, why, hint))


def _unreadable(view: NodeView) -> tuple[str, str]:
    """Return the reason why the affine can't be read, and a hint; two empty texts if it can be read."""
    several = len([name for name in view.node.output if name]) > 1
    training = view.attribute("training_mode", 0) if view.opset >= _TRAINING_MODE else several
    shape = view.shape()
    indices = range(1, 5)
    if training:
        return "it is in training mode, so it uses batch statistics", "the network exported in eval mode"
    if view.opset < 9 and view.attribute("spatial", 1) == 0:
        return "it has statistics for each position (spatial=0)", ""
    if not all(view.is_constant(index) for index in indices):
        hint = "initializers that are not listed among the graph's inputs"
        return view.why_not_constant(*indices, noun="parameters"), hint
    if shape is None:
        return UNKNOWN_SHAPE, "a file that shape inference can read"
    if len(shape) < 2:
        return "its input has no channel axis", "an input with a batch axis and a channel axis"
    constants = view.context.constants
    types = [view.dtype(), view.output_dtype, *(constants.dtype(view.input(index)) for index in indices)]
    if not all(dtype is not None and dtype.is_floating_point for dtype in types):
        return "its input or its parameters are not float16, bfloat16, float32 or float64", "the network exported again"
    first, *others = (constants.shape(view.input(index)) for index in indices)
    if len(first) != 1 or any(other != first for other in others):
        return "its parameters have different lengths", ""
    (size,) = first
    if isinstance(shape[1], int) and shape[1] != size:
        return f"its parameters are for {size} channels, and its input has {shape[1]}", ""
    return "", ""


def _channels(view: NodeView) -> int:
    shape = view.shape()
    size = shape[1] if shape is not None and len(shape) > 1 else 0
    return size if isinstance(size, int) else 0


@dataclass(frozen=True)
class _Link:
    """One node of arithmetic with a constant; ``affine`` is None if it can't be read, for the reason ``why_not``.

    ``scales`` is True if the constant is a scale with more than one number, ``shifts`` if the node adds or subtracts.
    """

    view: NodeView
    value: str
    affine: Affine | None
    scales: bool
    shifts: bool
    why_not: str = ""

    @property
    def axes(self) -> list[int]:
        """The axes along which the affine varies."""
        return [] if self.affine is None else self.affine.varying


def read_arithmetic(view: NodeView) -> OnnxReading | None:
    """Read a run of arithmetic with constants as one norm; if the run is not a norm, read its first node alone.

    A run is a norm, with a row in the report, if it multiplies or divides by more than one number, and all its constants vary
    along one axis. A run whose constants vary along several axes (statistics for each position) is a norm if it also has a
    shift. So ``x * 2``, ``x + bias`` and a table of positions are not norms. Every value inside the run has one reader.
    """
    first = _link(view)
    if first is None:
        return None
    if first.affine is None:
        if not first.scales or _following(first) is None:
            return None
        # It looks like a norm, but must stay, with the reason in the report.
        unread = NormCall(view.name, view.node.op_type, 0, None, first.why_not)
        values = tuple(name for name in view.node.input if name and not view.context.constants.known(name))
        return OnnxReading(Opaque(first.why_not), values, call=unread)
    links = _run(first)
    affine = first.affine
    for link in links[1:]:
        assert link.affine is not None
        affine = link.affine.after(affine)
    axes = {axis for link in links for axis in link.axes}
    if not any(link.scales for link in links) or (len(axes) > 1 and not any(link.shifts for link in links)):
        return OnnxReading(ConstantAffine(first.affine), (first.value,))
    nodes = [link.view.node for link in links]
    call = NormCall(links[-1].view.name, ", ".join(node.op_type for node in nodes), _size(view, first, axes), affine)
    return OnnxReading(ConstantAffine(affine), (first.value,), nodes=tuple(nodes[1:]), call=call)


def _run(first: _Link) -> list[_Link]:
    """Return the links from the first on, each the only reader of the previous one, as long as they vary along one axis."""
    links, axes = [first], set(first.axes)
    while (link := _following(links[-1])) is not None and link.affine is not None:
        more = axes | set(link.axes)
        if len(more) > 1 and more != axes:
            break
        links.append(link)
        axes = more
    return links


def _following(link: _Link) -> _Link | None:
    """Return the arithmetic that is the only reader of a link's result."""
    output = link.view.node.output[0]
    user = link.view.context.followers.get(output)
    found = _link(NodeView(user, link.view.context)) if user is not None and user.op_type in _ARITHMETIC else None
    return found if found is not None and found.value == output else None


def _link(view: NodeView) -> _Link | None:
    """Read one node; None for anything but floating-point arithmetic with one constant."""
    if not view.is_floating:
        return None
    if view.node.op_type == "Neg":
        if (shape := view.shape()) is None:
            return None
        identity = Affine.identity(len(shape))
        return _Link(view, view.input(0), Affine(-identity.scale, identity.shift), False, False)
    constants = view.context.constants
    given = [constants.known(name) or name in constants.overridable for name in view.node.input]
    if len(given) != 2 or given[0] == given[1]:
        return None
    slot = given.index(True)
    constant, value = view.input(slot), view.input(1 - slot)
    shifts = view.node.op_type in ("Add", "Sum", "Sub")
    if constant in constants.overridable:
        return _Link(view, value, None, not shifts, shifts, OVERRIDABLE.replace("weights", "parameters"))
    scales = not shifts and math.prod(constants.shape(constant)) > 1
    placed = placed_constant(view, slot, view.shape(1 - slot))
    if placed is None:
        return _Link(view, value, None, scales, shifts, _why_not_placed(view, slot))
    affine = arithmetic(_ELEMENTWISE[view.node.op_type], placed, first=slot == 0)
    if affine is None:
        return None
    if not is_finite(affine):
        return _Link(view, value, None, scales, shifts, "its scale or shift is not finite")
    return _Link(view, value, affine, scales, shifts)


def _why_not_placed(view: NodeView, slot: int) -> str:
    shape, given = view.shape(1 - slot), view.context.constants.shape(view.input(slot))
    if shape is None:
        return UNKNOWN_SHAPE
    if len(given) <= len(shape):
        pairs = zip(shape[len(shape) - len(given) :], given, strict=True)
        if any(size > 1 and not isinstance(there, int) for there, size in pairs):
            return "the file does not state the size of the axis that it normalises"
    return "its constants enlarge the value"


def _size(view: NodeView, first: _Link, axes: set[int]) -> int:
    """Return the number of channels; 0 if it varies, or if there are several axes."""
    shape = view.context.shapes.of(first.value) or ()
    size = shape[next(iter(axes))] if len(axes) == 1 else 0
    return size if isinstance(size, int) else 0


def placed_constant(view: NodeView, index: int, shape: tuple[Dim, ...] | None) -> Tensor | None:
    """Return a constant input with as many axes as a value, float64; None if it would enlarge the value."""
    return placed_on(view.context.constants.tensor(view.input(index)), shape) if shape else None


_ELEMENTWISE = {"Add": "add", "Sum": "add", "Sub": "sub", "Mul": "mul", "Div": "div"}
#: Operators of a run of arithmetic.
_ARITHMETIC = (*_ELEMENTWISE, "Neg")
