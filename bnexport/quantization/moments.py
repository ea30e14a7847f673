"""Ranges and means of a folded network's tensors from its BatchNorms, without data.

The output of a BatchNorm has mean beta and standard deviation |gamma| in each channel, and its input has the moving mean and
variance. Each is taken as normal (Nagel et al. 2019, arXiv 1906.04721). A tensor is represented by the values that it takes at
257 evenly spaced points of the normal distribution, from -4 to 4 standard deviations, with the density as weights. An
elementwise operator (ReLU, clamp, Sigmoid, SiLU in any spelling, HardSwish) is computed at these points, which gives the
moments of the clipped normal without a formula for each operator, and the range as their smallest and largest value. A sum of
different tensors adds means and variances. Pooling keeps the distribution of its input.

Folding removes BatchNorms and keeps their values: the output of a convolution with a folded BatchNorm is that BatchNorm's
output. Original and folded file are evaluated in float64 on the same few samples, and a tensor with the same numbers is the
same tensor. So no name has to be traced through exporters, whatever rule folded a BatchNorm.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, NodeProto

from bnexport.errors import ModelError
from bnexport.nn.statistics import NormView
from bnexport.onnx_files.float64 import Float64Evaluator, wide_evaluator
from bnexport.onnx_files.models import attributes
from bnexport.quantization.codes import Range, grouped
from bnexport.quantization.int8_plan import QuantizationPlan, QuantizedLayer
from bnexport.tensors import Array

if TYPE_CHECKING:
    from torch import nn

#: Standard deviations on both sides of a mean that a range covers.
SIGMA = 4.0
_POINTS = np.linspace(-SIGMA, SIGMA, 257)
_WEIGHTS = np.exp(-(_POINTS**2) / 2) / np.exp(-(_POINTS**2) / 2).sum()
#: Ridge of the estimate of means, as a share of the mean squared weight sum.
_RIDGE = 1e-2
_ELEMENTWISE = (
    "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus",
    "Softsign", "Erf", "Gelu", "Mish", "Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Sqrt", "Abs", "Neg", "Exp", "Identity",
    "Cast", "Dropout", "BatchNormalization",
)  # fmt: skip
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean")
#: Operators with outputs from 0 to 1 for every input, as the gates of squeeze-and-excitation.
_GATES = ("Sigmoid", "HardSigmoid", "Softmax")
_BOUNDED = "bounded by its operator"


@dataclass(frozen=True)
class TrainedMoments:
    """The trained moments of a tensor: mean and standard deviation of each channel (channels,), and the channels' axis."""

    mean: Array
    std: Array
    source: str = "BatchNorm"


@dataclass(frozen=True)
class Spread:
    """The values of a tensor at the points of the normal distribution."""

    values: Array  # (points, channels)
    base: int  # Tensors with one base are functions of the same variable; a number that is new for each independent one
    axis: int  # Axis of the channels; -1 where they can't be followed, and there is one for all
    rank: int  # Axes of the tensor
    source: str  # Origin of the values, as in ``Range``

    @property
    def mean(self) -> Array:
        """Return the mean of each channel."""
        return np.asarray(_WEIGHTS @ self.values)

    @property
    def std(self) -> Array:
        """Return the standard deviation of each channel."""
        return np.asarray(np.sqrt(_WEIGHTS @ np.square(self.values - self.mean)))

    @property
    def limits(self) -> tuple[Array, Array]:
        """Return the smallest and the largest value of each channel."""
        return self.values.min(axis=0), self.values.max(axis=0)

    def reach(self, sigmas: float) -> tuple[float, float]:
        """Return the range of the whole tensor at more standard deviations, with the slope at the outer points."""
        steps = (sigmas - SIGMA) / (_POINTS[1] - _POINTS[0])
        ends = [self.values[at] + steps * (self.values[at] - self.values[inner]) for at, inner in ((0, 1), (-1, -2))]
        every = np.concatenate([*ends, self.values.ravel()])
        return float(every.min()), float(every.max())

    def range(self, mean: Array | None = None) -> Range:
        """Return the range of the whole tensor, with its own or other means."""
        return Range.of(self.values.min(), self.values.max(), self.mean if mean is None else mean, self.source)


def spreads(
    plan: QuantizationPlan,
    known: Mapping[str, TrainedMoments],
    inputs: Mapping[str, TrainedMoments],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Spread]:
    """Return the spread of every tensor whose moments are known, or follow from known ones and assumed ones of the inputs."""
    return _Propagation(plan.model, known, shapes).run(inputs)


class _Propagation:
    def __init__(
        self, model: ModelProto, known: Mapping[str, TrainedMoments], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._model, self._known, self._shapes = model, known, shapes
        self._engine: Any = wide_evaluator(model)
        self._constants: dict[str, Any] = dict(self._engine.rt_inits_)
        self._bases = itertools.count()
        self._found: dict[str, Spread] = {}

    def run(self, inputs: Mapping[str, TrainedMoments]) -> dict[str, Spread]:
        for name, moments in inputs.items():
            self._found[name] = self._normal(moments, len(self._shapes[name]))
        for node, runner in zip(self._model.graph.node, self._engine.rt_nodes_, strict=True):
            name = str(node.output[0]) if node.output else ""
            if (constant := self._constant(node, runner)) is not None:
                self._constants[name] = constant
            elif name in self._known:
                self._found[name] = self._normal(self._known[name], len(self._shapes[name]))
            elif node.op_type == "Split":
                self._found |= self._parts(node)
            elif name in self._shapes and (spread := self._derived(node, runner)) is not None:
                self._found[name] = spread
        return self._found

    def _constant(self, node: NodeProto, runner: Any) -> Any:
        """Return the value of an operator that depends on no input; None for others."""
        given = list(node.input)
        if node.op_type == "CastLike":  # the second input gives its type alone, and all floats are float64 here
            given = [given[0], given[0]]
        if node.op_type.startswith("Random") or any(name and name not in self._constants for name in given):
            return None
        return runner.run(*(self._constants.get(name) for name in given))[0]

    def _normal(self, moments: TrainedMoments, rank: int) -> Spread:
        values = moments.mean + moments.std * _POINTS[:, None]
        return Spread(values, next(self._bases), 1 if rank > 1 else -1, rank, moments.source)

    def _derived(self, node: NodeProto, runner: Any) -> Spread | None:
        given = [self._found[name] for name in node.input if name in self._found]
        if node.domain not in ("", "ai.onnx"):
            return None
        if not given:
            return self._gate(node)
        if node.op_type in _ELEMENTWISE:
            return self._elementwise(node, runner, given)
        if node.op_type in _POOLS and len(given) == 1:
            return self._moved(node, given[0])
        if node.op_type in ("Pad", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose") and len(given) == 1:
            return self._moved(node, given[0])
        if node.op_type == "Concat" and len(given) == len(node.input):
            return self._joined(node, given)
        return None

    def _elementwise(self, node: NodeProto, runner: Any, given: list[Spread]) -> Spread | None:
        others = [name for name in node.input if name and name not in self._found]
        if any(name not in self._constants for name in others):
            return None
        if len({spread.base for spread in given}) > 1:
            return self._combined(node, given) if not others and len(given) == 2 else None
        first = given[0]
        if len({(spread.axis, spread.rank) for spread in given}) > 1:
            return None
        shape = [len(_POINTS), *[1] * (first.rank - 1)]
        if first.axis > 0:
            shape[first.axis] = first.values.shape[1]
        elif first.values.shape[1] > 1:
            return None
        feeds = [
            self._found[name].values.reshape(shape) if name in self._found else self._constants.get(name)
            for name in node.input
        ]
        try:
            with np.errstate(all="ignore"):
                result = np.asarray(runner.run(*feeds)[0])
        except Exception:  # any error of numpy: the moments stay unknown
            return None
        if list(result.shape) != shape or not np.isfinite(result).all():
            return None
        values = result.reshape(len(_POINTS), -1)
        return Spread(values, first.base, first.axis, first.rank, _derived_from(first.source))

    def _gate(self, node: NodeProto) -> Spread | None:
        """Return values spread evenly from 0 to 1 for an operator that is bounded by them; its input is not known."""
        shape = self._shapes[node.output[0]]
        if node.op_type not in _GATES or len(shape) < 2:
            return None
        values = np.repeat(np.linspace(0.0, 1.0, len(_POINTS))[:, None], shape[1], axis=1)
        return Spread(values, next(self._bases), 1, len(shape), _BOUNDED)

    def _combined(self, node: NodeProto, given: list[Spread]) -> Spread | None:
        """Return the sum, difference or product of two independent tensors, as a normal within their limits."""
        one, other = given
        if one.rank != other.rank or one.axis != other.axis or one.values.shape != other.values.shape:
            return None
        lows, highs = zip(one.limits, other.limits, strict=True)
        if node.op_type in ("Add", "Sub"):
            sign = 1.0 if node.op_type == "Add" else -1.0
            mean, std = one.mean + sign * other.mean, np.hypot(one.std, other.std)
            ends = [
                lows[0] + sign * (lows[1] if sign > 0 else highs[1]),
                highs[0] + sign * (highs[1] if sign > 0 else lows[1]),
            ]
        elif node.op_type == "Mul":
            mean = one.mean * other.mean
            square = (one.mean**2 + one.std**2) * (other.mean**2 + other.std**2)
            std = np.sqrt(np.maximum(square - mean**2, 0.0))
            products = np.stack([a * b for a in (lows[0], highs[0]) for b in (lows[1], highs[1])])
            ends = [products.min(axis=0), products.max(axis=0)]
        else:
            return None
        values = np.clip(mean + std * _POINTS[:, None], *ends)
        if node.op_type == "Mul" and _BOUNDED in (one.source, other.source):  # an open gate leaves the whole range
            values = one.values * other.mean if other.source == _BOUNDED else other.values * one.mean
            values[0], values[-1] = ends
        return Spread(values, next(self._bases), one.axis, one.rank, "derived from BatchNorm")

    def _moved(self, node: NodeProto, given: Spread) -> Spread | None:
        """Return the spread of numbers that were pooled or moved; channels are followed where that is simple."""
        before, after = self._shapes[node.input[0]], self._shapes[node.output[0]]
        values, axis = given.values, given.axis
        if node.op_type == "Transpose":
            order = list(attributes(node).get("perm", range(len(before))[::-1]))
            axis = order.index(axis) if axis >= 0 else -1
        elif axis == 1 and len(after) >= 2 and after[1] == before[1]:
            pass
        elif axis == 1 and len(after) == 2 and after[1] == int(np.prod(before[1:])):  # flattened: each channel repeats
            values = np.repeat(values, after[1] // before[1], axis=1)
        elif axis != -1:
            values, axis = _without_channels([values], [1]), -1
        return Spread(values, next(self._bases), axis, len(after), _derived_from(given.source))

    def _joined(self, node: NodeProto, given: list[Spread]) -> Spread | None:
        rank = len(self._shapes[node.output[0]])
        axis = attributes(node)["axis"] % rank
        if any(spread.axis not in (axis, -1) for spread in given):
            return None
        values = [spread.values for spread in given]
        if all(spread.axis == axis for spread in given):
            joined = np.concatenate(values, axis=1)
        else:
            joined = _without_channels(values, [self._shapes[name][axis] for name in node.input])
            axis = -1
        return Spread(joined, next(self._bases), axis, rank, "derived from BatchNorm")

    def _parts(self, node: NodeProto) -> dict[str, Spread]:
        """Return the spreads of the outputs of a Split, each with its channels."""
        given, found, at = self._found.get(node.input[0]), {}, 0
        if given is None:
            return {}
        axis = attributes(node).get("axis", 0) % given.rank
        for name in node.output:
            end = at + self._shapes[name][axis]
            values = given.values[:, at:end] if axis == given.axis else given.values
            found[name] = Spread(values, next(self._bases), given.axis, given.rank, _derived_from(given.source))
            at = end
        return found


def _without_channels(values: Sequence[Array], sizes: Sequence[int]) -> Array:
    """Return the mean of the channels of several tensors (points, channels) as one channel, with the range of all."""
    whole = np.average([part.mean(axis=1) for part in values], axis=0, weights=sizes)[:, None]
    whole[0], whole[-1] = min(part.min() for part in values), max(part.max() for part in values)
    return np.asarray(whole)


def _derived_from(source: str) -> str:
    return "derived from BatchNorm" if source == "BatchNorm" else source


def refined_means(
    layers: list[QuantizedLayer],
    known: Mapping[str, TrainedMoments],
    mean: Array,
) -> Array:
    """Return E[x] of a tensor, improved by the trained output means of the layers that read it.

    Each layer with a known output mean states W E[x] + b = beta: as many equations as it has outputs. The estimate is the ridge
    solution nearest to the first estimate ``mean`` (channels,). It corrects what pooling and sums of dependent tensors leave
    unknown, and gives the mean of the pixels, which no BatchNorm contains.
    """
    stated = [layer for layer in layers if layer.output in known]
    if not stated:
        return mean
    width = stated[0].outputs_first.shape[1] * stated[0].groups
    if mean.size not in (1, width):
        return mean
    start = np.broadcast_to(mean, (width,)).astype(np.float64)
    rows, sides = [], []
    for layer in stated:
        seen = layer.outputs_first.astype(np.float64) * layer.inside
        taps = seen.reshape(*seen.shape[:2], -1).sum(axis=2)
        columns = grouped(np.arange(width), len(taps), taps.shape[1], layer.groups).astype(int)
        matrix = np.zeros((len(taps), width))
        np.put_along_axis(matrix, columns, taps, axis=1)
        rows.append(matrix)
        sides.append(known[layer.output].mean - layer.bias - matrix @ start)
    matrix, side = np.concatenate(rows), np.concatenate(sides)
    normal = matrix.T @ matrix
    ridge = _RIDGE * max(float(np.trace(normal)) / width, np.finfo(np.float64).tiny)
    return np.asarray(start + np.linalg.solve(normal + ridge * np.eye(width), matrix.T @ side))


#: Largest difference, of scale, of one tensor in both evaluations: float32 weights against float64 ones, over many layers.
_SAME = 1e-4


@dataclass(frozen=True)
class Seen:
    """Values of a BatchNorm's input or output (n, channels, ...) with the trained moments."""

    values: Array
    moments: TrainedMoments


def seen_in_module(module: nn.Module, feeds: Mapping[str, Array]) -> list[Seen]:
    """Return the outputs and inputs of a module's BatchNorm calls, in float64; outputs first. The module is not changed."""
    import torch

    from bnexport.nn.calling import to_eval_mode

    copied = to_eval_mode(copy.deepcopy(module)).to("cpu", torch.float64)
    outputs: list[Seen] = []
    inputs: list[Seen] = []

    def look(layer: Any, given: tuple[Any, ...], result: Any) -> None:
        view = NormView.of(layer)
        assert view is not None
        mean, std = view.mean.reshape(-1).numpy(), torch.sqrt(view.var.reshape(-1)).numpy()
        ones = np.ones_like(mean)
        gamma = ones if view.gamma is None else view.gamma.detach().reshape(-1).numpy()
        beta = 0 * ones if view.beta is None else view.beta.detach().reshape(-1).numpy()
        outputs.append(Seen(result.detach().numpy().copy(), TrainedMoments(beta, np.abs(gamma))))
        inputs.append(Seen(given[0].detach().numpy().copy(), TrainedMoments(mean, std)))

    for layer in copied.modules():
        if NormView.of(layer) is not None:
            layer.register_forward_hook(look)
    with torch.no_grad():
        copied(
            *(
                torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array)
                for array in feeds.values()
            )
        )
    return outputs + inputs


def seen_in_file(original: ModelProto, feeds: Mapping[str, Array]) -> list[Seen]:
    """Return the outputs and inputs of an unfolded file's BatchNormalization nodes, in float64; outputs first."""
    from onnx import numpy_helper

    values = {**feeds, **Float64Evaluator(original).intermediate(feeds)}
    values |= {tensor.name: numpy_helper.to_array(tensor) for tensor in original.graph.initializer}
    outputs, inputs = [], []
    for node in original.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        gamma, beta, mean, var = (values[name].astype(np.float64).reshape(-1) for name in node.input[1:5])
        outputs.append(Seen(values[node.output[0]], TrainedMoments(beta, np.abs(gamma))))
        inputs.append(Seen(values[node.input[0]], TrainedMoments(mean, np.sqrt(var))))
    return outputs + inputs


def known_moments(seen: Sequence[Seen], values: Mapping[str, Array]) -> dict[str, TrainedMoments]:
    """Return the trained moments of each tensor of the folded file with the numbers of a BatchNorm's output or input.

    Both sides are values on the same samples. An earlier entry of ``seen``, from the original network, wins.
    """
    known: dict[str, TrainedMoments] = {}
    for entry in seen:
        moments = entry.moments
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.std).all()):
            raise ModelError(
                "a BatchNorm has a beta, gamma or moving statistic that is not finite",
                remedy="Load other weights, or run bnexport recalibrate",
            )
        for name, array in values.items():
            if name not in known and _same(array, entry.values):
                known[name] = moments
    return known


def _same(one: Array, other: Array) -> bool:
    if one.shape != other.shape or one.dtype.kind != "f":
        return False
    return bool(np.abs(one - other).max(initial=0.0) <= _SAME * max(float(np.abs(other).max(initial=0.0)), 1e-30))
