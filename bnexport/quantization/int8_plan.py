"""Choose the layers of a float32 ONNX graph that become int8, and the tensors that need codes.

Convolutions and Gemms with constant weights become int8. The input of each has codes, and so has its output where another int8
layer follows; a ReLU or clamp after a layer belongs to it. Operators that only move numbers pass the codes of their input on.
The output of the last layers stays in float: rounding the logits alone cost 0.16 of scale on a BN-LeNet, everything else 0.03.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from bnexport.errors import ModelError, UsageError
from bnexport.onnx_files.models import attributes, opset_of, refill, subgraphs
from bnexport.quantization.codes import ABSORBED, MOVERS, correction, is_depthwise
from bnexport.quantization.integer_emulation import window_axes
from bnexport.tensors import Array

#: The first operator set whose DequantizeLinear has one scale for each channel.
OLDEST_OPSET = 13
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_SHOWN = 8


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer that becomes int8."""

    node: NodeProto  # Conv, Gemm or MatMul
    weight: Array  # As the file stores it
    bias: Array  # (out,), zeros without one
    axis: int  # Axis of the output channels in the weight
    groups: int  # Groups of a convolution, else 1
    depthwise: bool  # Each output channel reads one input channel, which no other reads
    shift: NodeProto | None = None  # The Add with the bias of a MatMul
    #: Share of the output positions at which each tap of the kernel is inside the input, not in its padding: (*kernel)
    inside: Array = field(default_factory=lambda: np.ones(()))

    @property
    def name(self) -> str:
        """Return the name in messages and in the manifest."""
        return self.node.name or self.node.output[0]

    @property
    def input(self) -> str:
        """Return the name of the tensor that it reads."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """Return the name of its output with the bias."""
        return str((self.shift or self.node).output[0])

    def corrected_bias(self, rounded: Array, mean: Sequence[float] | Array) -> Array:
        """Return the bias without the mean error of the outputs by a rounded weight, output channels first.

        ``mean`` is E[x] of each input channel, or one number for all. Its average is taken where it belongs to another axis.
        """
        found, exact = np.asarray(mean, np.float64), self.outputs_first.astype(np.float64)
        if found.size not in (1, exact.shape[1] * self.groups):
            found = found.mean(keepdims=True)
        return np.asarray(self.bias - correction(exact, rounded, found, self.groups, self.inside))

    @property
    def outputs_first(self) -> Array:
        """Return the weight as (out, in / groups, *kernel)."""
        return self.weight if self.axis == 0 else self.weight.swapaxes(0, self.axis)

    def stored(self, outputs_first: Array) -> Array:
        """Return a weight with output channels first in the layout of the file."""
        return outputs_first if self.axis == 0 else outputs_first.swapaxes(0, self.axis)


class QuantizationPlan:
    """The int8 layers and the tensors with codes.

    Args:
        model: A folded float32 model, which is not changed.
        float_layers: Layers that stay in float: names of nodes, outputs, weights or modules ("conv1" of "conv1.weight").

    Attributes:
        layers: In the order of the graph.
        tensors: Tensor with codes -> the tensor whose range it has; itself where it has its own. In the order of the graph.
        required: Tensors without which a layer can't be int8.
        pixels: Output of a Cast -> the uint8 input that it reads.
        kept: Name of a layer that stays in float -> why.

    Raises:
        UsageError: A float layer that the file does not have.
        ModelError: The graph can't be quantised: half precision, If or Loop, an old operator set, no layer at all.
    """

    def __init__(self, model: ModelProto, float_layers: Sequence[str] = ()) -> None:
        _refuse_unfit(model)
        model = constants_stored(model)
        self.model = model
        self.kept: dict[str, str] = {}
        self.outputs = {value.name for value in model.graph.output}
        self.pixels = casts_of_pixels(model)
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in filter(None, node.input):
                self.readers.setdefault(name, []).append(node)
        chosen = self._chosen(float_layers)
        self.layers = tuple(
            layer for node in model.graph.node if id(node) not in chosen and (layer := self._layer(node)) is not None
        )
        if not self.layers:
            raise ModelError(
                "the network has no convolution or fully connected layer that can become int8",
                remedy="Leave --precision int8 out",
            )
        self.required: set[str] = {layer.input for layer in self.layers}
        self.tensors = self._tensors()

    def set_sizes(self, sizes: Mapping[str, Sequence[int]]) -> None:
        """Give the layers the sizes (*size) of their inputs (n, channels, *size), for the share of the padding."""
        self.layers = tuple(replace(layer, inside=_inside(layer, sizes.get(layer.input))) for layer in self.layers)

    def drop(self, names: set[str]) -> None:
        """Leave tensors without codes whose range is not known; none of them may be required."""
        self.tensors = {name: root for name, root in self.tensors.items() if not {name, root} & names}

    def _chosen(self, names: Sequence[str]) -> set[int]:
        """Return the ids of the nodes that the user keeps in float."""
        called: dict[str, list[NodeProto]] = {}
        for node in self.model.graph.node:
            if node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
                weight = node.input[1] if len(node.input) > 1 else ""
                for name in {node.name, *node.output, weight, weight.rpartition(".")[0]} - {""}:
                    called.setdefault(name, []).append(node)
        if odd := [name for name in names if name not in called]:
            layers = list(dict.fromkeys(layer_name(node) for nodes in called.values() for node in nodes))
            shown = ", ".join(layers[:_SHOWN]) + (", ..." if len(layers) > _SHOWN else "")
            raise UsageError(
                f"the layer {odd[0]!r}, to be kept in float, does not exist", remedy=f"Name one of: {shown}"
            )
        found = [node for name in names for node in called[name]]
        self.kept |= {node.name or node.output[0]: "--float-layers" for node in found}
        return {id(node) for node in found}

    def _layer(self, node: NodeProto) -> QuantizedLayer | None:
        """Return a node as a layer; None for other operators, and for layers without constant weights."""
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
            return None
        why = self._why_float(node)
        if why:
            self.kept[node.name or node.output[0]] = why
            return None
        settings, shift = attributes(node), None
        weight = numpy_helper.to_array(self._weights[node.input[1]])
        axis = _output_axis(node)
        groups = int(settings.get("group", 1)) if node.op_type == "Conv" else 1
        bias = self._bias(node.input[2] if len(node.input) > 2 else "", weight.shape[axis])
        if node.op_type == "MatMul":
            shift, bias = self._shift(node, weight.shape[axis])
        assert bias is not None
        return QuantizedLayer(node, weight, bias, axis, groups, is_depthwise(groups, weight.shape), shift)

    def _shift(self, node: NodeProto, size: int) -> tuple[NodeProto | None, Array]:
        """Return the Add of a constant per channel after a MatMul, with the constant; None and zeros without one."""
        readers = self.readers.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Add" and node.output[0] not in self.outputs:
            for name in readers[0].input:
                if name in self._weights and (bias := self._bias(name, size)) is not None:
                    return readers[0], bias
        return None, np.zeros(size)

    def _why_float(self, node: NodeProto) -> str:
        """Return why a linear operator stays in float; "" when it becomes int8."""
        if node.op_type == "ConvTranspose":
            return "ONNX Runtime has no integer ConvTranspose for CPUs"
        stored = self._weights.get(node.input[1])
        if stored is None or stored.data_type != TensorProto.FLOAT:
            return "its weight is not stored in float32"
        if node.op_type == "MatMul":
            return "" if len(stored.dims) == 2 else "its weight is not one matrix"
        settings = attributes(node)
        if node.op_type == "Gemm" and (
            settings.get("transA", 0) or settings.get("alpha", 1.0) != 1 or settings.get("beta", 1.0) != 1
        ):
            return "it has alpha, beta or transA"
        bias = self._bias(node.input[2] if len(node.input) > 2 else "", stored.dims[_output_axis(node)])
        return "" if bias is not None else "its bias is not one constant per channel"

    def _bias(self, name: str, size: int) -> Array | None:
        """Return a bias in float64 (out,), zeros for ""; None where it is not constant or has another shape."""
        if not name:
            return np.zeros(size)
        stored = self._weights.get(name)
        if stored is None or math.prod(stored.dims) != size or (len(stored.dims) > 1 and stored.dims[-1] != size):
            return None
        return numpy_helper.to_array(stored).astype(np.float64).reshape(-1)

    def channel_axis(self, name: str) -> int:
        """Return the axis of a tensor along which the layers that read it have one mean for each channel."""
        return -1 if any(layer.input == name and layer.node.op_type == "MatMul" for layer in self.layers) else 1

    def end(self, name: str) -> str:
        """Return the output of the ReLU or clamp that belongs to a layer, or else the layer's output."""
        readers = self.readers.get(name, [])
        if name in self.outputs or len(readers) != 1 or readers[0].op_type not in ABSORBED:
            return name
        return self.end(str(readers[0].output[0]))

    def _tensors(self) -> dict[str, str]:
        reaching = self._reaching()
        ends = {self.end(layer.output) for layer in self.layers}
        marked = self.required | {name for name in ends if name in reaching}
        shares: dict[str, str] = {}
        for node in reversed(self.model.graph.node):  # the input of a mover needs codes, too
            name = str(node.output[0]) if node.output else ""
            if name in marked and self._moves(node):
                source = str(node.input[0])
                shares[name] = source
                marked.add(source)
                if name in self.required:
                    self.required = self.required | {source}
        order = [value.name for value in self.model.graph.input]
        order += [str(name) for node in self.model.graph.node for name in node.output]
        return {name: _root(name, shares) for name in order if name in marked}

    def _moves(self, node: NodeProto) -> bool:
        """Return whether an operator only moves numbers; a padding with another constant than 0 adds one."""
        if node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
            value = self._weights.get(node.input[2])
            return value is not None and not numpy_helper.to_array(value).any()
        return node.op_type in MOVERS

    def _reaching(self) -> set[str]:
        """Return the tensors from which an int8 layer can be reached."""
        int8 = {id(layer.node) for layer in self.layers}
        found: set[str] = set()
        for node in reversed(self.model.graph.node):
            if id(node) in int8:
                found.add(str(node.input[0]))
            elif any(name in found for name in node.output):
                found.update(name for name in node.input if name)
        return found


def _inside(layer: QuantizedLayer, size: Sequence[int] | None) -> Array:
    if layer.node.op_type != "Conv" or size is None:
        return np.ones(())
    share = np.ones(layer.weight.shape[2:])
    for at, axis in enumerate(window_axes(layer.node, size, share.shape)):
        if axis.count < 1:  # a manifest can state any size
            raise ValueError(f"an input of size {axis.size} is too small for {layer.name}")
        offset = axis.before - np.arange(axis.kernel) * axis.dilation  # a tap reads position * stride - offset
        first = np.clip(-(-offset // axis.stride), 0, axis.count)
        seen = (np.clip((axis.size - 1 + offset) // axis.stride + 1, first, axis.count) - first) / axis.count
        share = share * seen.reshape([-1 if at == place else 1 for place in range(share.ndim)])
    return share


def constants_stored(model: ModelProto) -> ModelProto:
    """Return a model whose tensors of Constant nodes are initializers: the same model if it has no such node."""
    outputs = {value.name for value in model.graph.output}
    found = [node for node in model.graph.node if node.op_type == "Constant" and node.output[0] not in outputs]
    stored = [(node, value) for node in found if (value := attributes(node).get("value")) is not None]
    if not stored:
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    names = {node.output[0] for node, _ in stored}
    refill(copy.graph.node, [node for node in copy.graph.node if not names & set(node.output)])
    for node, value in stored:
        copy.graph.initializer.add().CopyFrom(value)
        copy.graph.initializer[-1].name = node.output[0]
    return copy


def casts_of_pixels(model: ModelProto) -> dict[str, str]:
    """Return output of a Cast -> the uint8 input of the model that it reads."""
    bytes_in = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
    casts = (node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in bytes_in)
    return {str(node.output[0]): str(node.input[0]) for node in casts}


def _root(name: str, shares: Mapping[str, str]) -> str:
    while name in shares:
        name = shares[name]
    return name


def _output_axis(node: NodeProto) -> int:
    """Return the axis of the output channels in the weight of a linear operator."""
    return int(node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB", 0)))


def layer_name(node: NodeProto) -> str:
    """Return the name of a layer for --float-layers: its module's, else its node's."""
    module = node.input[1].rpartition(".")[0] if len(node.input) > 1 else ""
    return module or node.name or str(node.output[0])


def _refuse_unfit(model: ModelProto) -> None:
    """Refuse (ModelError) graphs that the plan does not cover."""
    if (node := next(filter(subgraphs, model.graph.node), None)) is not None:
        raise ModelError(
            f"the network has {node.op_type}, whose inner graphs can't be quantised",
            remedy="Leave --precision int8 out",
        )
    if model.functions:
        raise ModelError("the file has functions, which can't be quantised", remedy="Inline them with onnx.inliner")
    if half := [tensor.name for tensor in model.graph.initializer if tensor.data_type in _HALVES]:
        raise ModelError(
            f"{half[0]!r} is in half precision; int8 is made from float32", remedy="Give the float32 network"
        )
    if (opset := opset_of(model)) < OLDEST_OPSET:
        raise ModelError(
            f"the file has operator set {opset}; scales per channel need {OLDEST_OPSET}",
            remedy=f"Export the network again with operator set {OLDEST_OPSET} or newer",
        )
