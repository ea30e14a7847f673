"""Write a float32 graph with QuantizeLinear and DequantizeLinear around its int8 layers.

Every reader has a separate DequantizeLinear, since engines fuse a layer only with one that nothing else reads. Nodes stay in
the order of the graph, names and bytes are the same for the same input, and onnx.checker accepts the file. ``repaired`` rounds
the weights of an existing int8 file again.

ONNX Runtime rounds the weight of a float layer between codes to int8, with one scale for all channels. A Max with the lowest
number in front of the layer, which changes no value, prevents that; ONNX Runtime removes a Mul with 1 or an Identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from bnexport.errors import ModelError
from bnexport.onnx_files.models import Names, attributes, check_written, mentions, nodes, refill
from bnexport.onnx_files.normalisation import normalise, upgraded
from bnexport.quantization.codes import (
    Codes,
    Coding,
    Range,
    coding_of,
    correction,
    encode,
    encode_bias,
    is_depthwise,
    least_scales,
    saturating_channels,
)
from bnexport.quantization.int8_plan import OLDEST_OPSET, QuantizationPlan, QuantizedLayer, constants_stored
from bnexport.quantization.integer_emulation import Int8Layer, int8_layers, rounded_float_layers
from bnexport.tensors import Array

_LOWEST = np.finfo(np.float32).min


class _Additions:
    """The tensors and nodes that are added to a model, under free names."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self._names = Names(model)

    def store(self, name: str, what: str, array: Array) -> str:
        """Store a tensor, and return its name."""
        free = self._names.free(name, what)
        self.tensors.append(numpy_helper.from_array(array, free))
        return free

    def encoded(self, name: str, codes: str, scale: str, zero: str) -> None:
        """Add a QuantizeLinear of a tensor."""
        self.nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [codes], name=codes))

    def decoded(self, name: str, inputs: Sequence[str], axis: int | None = None) -> str:
        """Add a DequantizeLinear of the codes of a tensor, and return the name of its output."""
        free = self._names.free(name, "decoded")
        settings: dict[str, Any] = {} if axis is None else {"axis": axis}
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [free], name=free, **settings))
        return free

    def weight(self, name: str, found: Codes, axis: int) -> str:
        """Store the codes of a weight, whose output channels get along an axis of the file's layout, and decode them."""
        codes = found.codes if axis == 0 else np.ascontiguousarray(found.codes.swapaxes(0, axis))
        inputs = [
            self.store(name, "codes", codes),
            *self._scale(name, found.scales, np.zeros(len(found.scales), np.int8)),
        ]
        return self.decoded(name, inputs, axis)

    def bias(self, name: str, bias: Array, scales: Array) -> str:
        """Store the codes of a bias (out,) with float32 scales (out,), and decode them."""
        inputs = [self.store(name, "codes", encode_bias(bias, scales)), self.store(name, "scale", scales)]
        return self.decoded(name, inputs, 0)

    def guarded(self, name: str) -> str:
        """Add a guard of a tensor, and return the name of its output."""
        free = self._names.free(name, "guarded")
        lowest = self.store(name, "lowest", np.array(_LOWEST))
        self.nodes.append(helper.make_node("Max", [name, lowest], [free], name=free))
        return free

    def _scale(self, name: str, scale: Array, zero: Array) -> tuple[str, str]:
        return self.store(name, "scale", scale), self.store(name, "zero", zero)


def quantised_model(plan: QuantizationPlan, ranges: Mapping[str, Range], target: str) -> ModelProto:
    """Return the int8 model of a plan.

    Args:
        plan: Of the folded float32 model, which is not changed.
        ranges: Tensor -> its range, for every tensor with codes.
        target: One of ``bundle.INT8_TARGETS``.

    Raises:
        ModelError: A range is not finite.
        ExportError: The written model is not valid ONNX.
    """
    codings = {name: coding_of(name, ranges[name], target) for name in plan.tensors}
    model = guarded_model(_Writer(plan, codings, ranges).write())
    check_written(model, "the int8 file", remedy="Report it with the model")
    return model


class _Writer(_Additions):
    def __init__(self, plan: QuantizationPlan, codings: Mapping[str, Coding], ranges: Mapping[str, Range]) -> None:
        super().__init__(plan.model)
        self._plan, self._codings, self._ranges = plan, codings, ranges
        self._stored = {tensor.name: tuple(tensor.dims) for tensor in plan.model.graph.initializer}
        self._layers = {layer.node.output[0]: layer for layer in plan.layers}
        self._codes: dict[str, tuple[str, str, str]] = {}
        self._shifts: dict[str, str] = {}  # Output of the Add after a MatMul -> its corrected constant

    def write(self) -> ModelProto:
        model = ModelProto()
        model.CopyFrom(self._plan.model)
        graph = model.graph
        for value in graph.input:
            self._quantise(value.name)
        for node in graph.node:
            if not self._pixels_are_codes(node):
                self._node(node)
                for name in node.output:
                    self._quantise(name)
        _put(self, model)
        return model

    def _node(self, node: NodeProto) -> None:
        copy = NodeProto()
        copy.CopyFrom(node)
        layer = self._layers.get(node.output[0]) if node.output else None
        for place, name in enumerate(node.input):
            if name in self._codes:
                copy.input[place] = self.decoded(name, self._codes[name])
            elif node.output[0] in self._shifts and name in self._stored:
                copy.input[place] = self._shifts[node.output[0]]
        if layer is not None:
            names = self._weights(layer)
            del copy.input[1:]
            copy.input.extend(names)
        self.nodes.append(copy)

    def _pixels_are_codes(self, node: NodeProto) -> bool:
        """Return whether the codes of a Cast's output are the pixels that it reads: then readers decode these instead."""
        name = str(node.output[0]) if node.output else ""
        coding = self._codings.get(name) if name in self._plan.pixels else None
        if coding is None or not coding.is_plain or name in self._plan.outputs:
            return False
        self._codes[name] = (self._plan.pixels[name], *self._scale(name, np.array(coding.scale), coding.zero_array))
        return True

    def _quantise(self, name: str) -> None:
        if (coding := self._codings.get(name)) is not None:
            scale = self._scale(name, np.array(coding.scale), coding.zero_array)
            self._codes[name] = (self._names.free(name, "codes"), *scale)
            self.encoded(name, *self._codes[name])

    def _weights(self, layer: QuantizedLayer) -> list[str]:
        """Store the codes of a layer's weight and bias, and return the names of their decoded values.

        The bias of a MatMul, which an Add has, stays in float.
        """
        coding, mean = self._codings[layer.input], self._ranges[layer.input].mean
        least = least_scales(layer.bias, float(coding.scale))
        biased = layer.node.op_type != "MatMul" or layer.shift is not None
        exact = layer.outputs_first.astype(np.float64)
        found = encode(exact, pair_safe=not layer.depthwise, least=least, corrected=biased)
        corrected = layer.corrected_bias(found.values, mean)
        weight = self.weight(str(layer.node.input[1]), found, layer.axis)
        if layer.node.op_type != "MatMul":
            name = str(layer.node.input[2]) if len(layer.node.input) > 2 else ""
            return [weight, self.bias(name or f"{layer.node.input[1]}_bias", corrected, found.scales * coding.scale)]
        if layer.shift is not None:
            (shape,) = (self._stored[name] for name in layer.shift.input if name in self._stored)
            self._shifts[layer.output] = self.store(layer.output, "bias", corrected.astype(np.float32).reshape(shape))
        return [weight]


def guarded_model(model: ModelProto) -> ModelProto:
    """Return a QDQ model with a guard in front of each float layer that ONNX Runtime would round; itself without one."""
    found = {node.output[0] for node in rounded_float_layers(model)}
    if not found:
        return model
    result = ModelProto()
    result.CopyFrom(model)
    added = _Additions(result)
    for node in result.graph.node:
        if node.output[0] in found:
            node.input[0] = added.guarded(node.input[0])
        added.nodes.append(node)
    _put(added, result)
    return result


def is_guard(node: NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether a node is a Max with the lowest float32 number, which changes no value."""
    plain = node.op_type == "Max" and node.domain in ("", "ai.onnx") and not node.attribute
    if not plain or len(node.input) != 2 or node.input[1] not in stored:
        return False
    lowest = numpy_helper.to_array(stored[node.input[1]])
    return lowest.dtype == np.float32 and lowest.shape == () and bool(lowest == _LOWEST)


def _put(added: _Additions, model: ModelProto) -> None:
    """Give a model its new nodes and tensors, without those that nothing reads."""
    count = mentions(model.graph)
    count.update(name for node in added.nodes for name in node.input)
    kept = [node for node in added.nodes if node.op_type != "DequantizeLinear" or count[node.output[0]]]
    refill(model.graph.node, kept)
    count = mentions(model.graph)
    tensors = [tensor for tensor in (*model.graph.initializer, *added.tensors) if count[tensor.name]]
    refill(model.graph.initializer, tensors)
    del model.graph.value_info[:]


# --- files of other tools -----------------------------------------------------------------------------------------------------

#: QOperator -> the float operator, and the number of inputs with codes. The bias of QLinearConv comes last.
_QOPERATORS = {
    "QLinearConv": ("Conv", 2), "QLinearMatMul": ("MatMul", 2), "QGemm": ("Gemm", 2), "QLinearAdd": ("Add", 2),
    "QLinearMul": ("Mul", 2), "QLinearGlobalAveragePool": ("GlobalAveragePool", 1),
    "QLinearAveragePool": ("AveragePool", 1), "QLinearSigmoid": ("Sigmoid", 1), "QLinearLeakyRelu": ("LeakyRelu", 1),
}  # fmt: skip
#: Operators whose activations get their scale while they run.
DYNAMIC = ("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
_MARKS = {"QuantizeLinear", "DequantizeLinear", *_QOPERATORS, *DYNAMIC}


def is_int8_model(model: ModelProto) -> bool:
    """Return whether a model contains operators with int8 codes."""
    return any(node.op_type in _MARKS for node in nodes(model))


def as_qdq(model: ModelProto) -> ModelProto:
    """Return a sorted copy in the QDQ form, with constants and quantised weights stored as initializers."""
    result = ModelProto()
    result.CopyFrom(constants_stored(model))
    normalise(result)
    graph, names, written = result.graph, Names(result), list[NodeProto]()
    for node in graph.node:
        if node.op_type in _QOPERATORS:
            written += _split(node, names, graph)
        else:
            written.append(node)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kept = [node for node in written if not _encoded(node, stored, graph)]
    refill(graph.node, kept)
    return result


def _split(node: NodeProto, names: Names, graph: Any) -> Iterator[NodeProto]:
    """Yield DequantizeLinear nodes, the float operator and QuantizeLinear in place of one QOperator."""
    operator, count = _QOPERATORS[node.op_type]
    given, rest = list(node.input), list(node.input)[3 * count :]
    inputs, settings, last = [], attributes(node), node.output[0]
    known = {key: value for key, value in settings.items() if key != "channels_last"}
    before, after = _channels_last(node, graph) if settings.get("channels_last", 0) else ([], [])
    if before:  # ONNX Runtime's layout for its convolutions and pools
        source, given[0], last = given[0], names.free(given[0], "channels_first"), names.free(last, "channels_first")
        yield helper.make_node("Transpose", [source], [given[0]], perm=before)
    for place in range(count):
        parts = [name for name in given[3 * place : 3 * place + 3] if name]
        inputs.append(names.free(parts[0], "decoded"))
        decoder = helper.make_node("DequantizeLinear", parts, inputs[-1:])
        if place and _stored(graph, parts[1]).size > 1:  # one scale for each output channel
            axis = 1 if operator == "MatMul" or (operator == "Gemm" and not settings.get("transB", 0)) else 0
            decoder.attribute.append(helper.make_attribute("axis", axis))
        yield decoder
    bias = rest[0] if operator == "Gemm" else rest[2] if operator == "Conv" and len(rest) > 2 else ""
    output = rest[1:3] if operator == "Gemm" else rest[:2]
    if bias:
        scale = np.asarray(_stored(graph, given[1]) * _stored(graph, given[4]), np.float32)
        name = names.free(bias, "scale")
        graph.initializer.append(numpy_helper.from_array(scale if scale.size > 1 else scale.reshape(()), name))
        inputs.append(names.free(bias, "decoded"))
        yield helper.make_node("DequantizeLinear", [bias, name], inputs[-1:], axis=0)
    scaled = len(output) > 0 and bool(output[0])
    result = names.free(node.output[0], "float") if scaled else last
    yield helper.make_node(operator, inputs, [result], name=node.name, **known)
    if scaled:
        yield helper.make_node("QuantizeLinear", [result, *filter(None, output[:2])], [last])
    if after:
        yield helper.make_node("Transpose", [last], [node.output[0]], perm=after)


def _channels_last(node: NodeProto, graph: Any) -> tuple[list[int], list[int]]:
    """Return the orders of axes that move the channels of an operator to the front and back; images without a kernel."""
    size = attributes(node).get("kernel_shape", (1, 1))
    if node.op_type == "QLinearConv":
        size = _stored(graph, node.input[3]).shape[2:]
    rank = len(size) + 2
    return [0, rank - 1, *range(1, rank - 1)], [0, *range(2, rank), 1]


def _stored(graph: Any, name: str) -> Array:
    for tensor in graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor)
    raise ModelError(f"{name!r}, a scale, is not stored in the file", remedy="Give a file with static quantization")


def _encoded(node: NodeProto, stored: dict[str, Any], graph: Any) -> bool:
    """Store the codes of a QuantizeLinear of a stored weight; return whether the node was replaced by them."""
    if node.op_type != "QuantizeLinear" or not all(name in stored for name in node.input):
        return False
    weight, scale, *zero = (numpy_helper.to_array(stored[name]) for name in node.input)
    shift = zero[0] if zero else np.zeros(scale.shape, np.uint8)
    if shift.dtype not in (np.int8, np.uint8):
        return False
    axis = int(attributes(node).get("axis", 1)) % max(weight.ndim, 1)  # a scalar, as the 3 of a HardSwish, has no axis
    shape = [-1 if place == axis else 1 for place in range(weight.ndim)] if scale.size > 1 else [1] * weight.ndim
    limits = np.iinfo(shift.dtype)
    codes = np.clip(np.rint(weight / scale.reshape(shape)) + shift.reshape(shape), limits.min, limits.max)
    graph.initializer.append(numpy_helper.from_array(codes.astype(shift.dtype), node.output[0]))
    stored[node.output[0]] = graph.initializer[-1]
    return True


@dataclass(frozen=True)
class LayerRisk:
    """The channels of one int8 layer, and how many of them can saturate in some order of pairs."""

    name: str
    channels: int
    saturating: int


def dynamic_risks(model: ModelProto) -> list[LayerRisk]:
    """Return the layers whose activations get their scale while they run, with int8 weights stored in the file."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        weight = stored.get(node.input[1]) if node.op_type in DYNAMIC else None
        codes = None if weight is None else numpy_helper.to_array(weight)
        if codes is not None and codes.dtype == np.int8 and codes.ndim > 1:
            first = codes if node.op_type == "ConvInteger" else codes.reshape(-1, codes.shape[-1]).T
            depthwise = node.op_type == "ConvInteger" and is_depthwise(attributes(node).get("group", 1), codes.shape)
            unsafe = 0 if depthwise else int(saturating_channels(first).sum())
            found.append(LayerRisk(node_name(node), len(first), unsafe))
    return found


def node_name(node: NodeProto) -> str:
    """Return the name of a node in messages."""
    return node.name or str(node.output[0])


# --- repair of an existing file -----------------------------------------------------------------------------------------------


def repaired(model: ModelProto, means: Mapping[str, Array] | None = None) -> ModelProto:
    """Return the model in the QDQ form with weights of which no channel can saturate, and guards of its float layers.

    Each layer with a saturating channel is rounded again, from its decoded weights, with one scale per output channel.

    Args:
        model: An int8 model, which is not changed.
        means: Layer's output -> E[x] of each input channel, by which the bias is corrected; None: the bias keeps its value.

    Raises:
        ModelError: The model can't be repaired: dynamic scales, an operator set that onnx can't convert, nothing to repair.
    """
    result = upgraded(as_qdq(model), "the file", OLDEST_OPSET)  # scales per channel need a newer DequantizeLinear
    if any(risk.saturating for risk in dynamic_risks(result)):
        raise ModelError("layers with scales of run time can't be repaired", remedy="Quantise the network statically")
    layers = {layer.output: layer for layer in int8_layers(result) if layer.can_saturate}
    if not layers and not rounded_float_layers(result):
        raise ModelError("no channel can saturate, so there is nothing to repair", remedy="Leave --repair out")
    repair = _Repair(result)
    for node in result.graph.node:
        if node.output[0] in layers:
            layer = layers[node.output[0]]
            repair.layer(layer, node, (means or {}).get(layer.output))
        repair.nodes.append(node)
    _put(repair, result)
    result = guarded_model(result)
    check_written(result, "the repaired file", remedy="Report it with the file")
    return result


class _Repair(_Additions):
    """Rounds layers again."""

    def __init__(self, model: ModelProto) -> None:
        super().__init__(model)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._decoders = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}

    def layer(self, layer: Int8Layer, node: NodeProto, mean: Array | None) -> None:
        """Connect a layer to new weights."""
        old = self._old(node.input[1])
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB", 0))
        exact = old.T if transposed else old
        name = node.input[2] if len(node.input) > 2 else ""
        bias = self._old(name).reshape(-1) if name else np.zeros(len(exact))
        constant = len(bias) == len(exact)
        least = least_scales(bias, layer.step) if constant else None
        plain = attributes(node).get("alpha", 1.0) == 1 and attributes(node).get("beta", 1.0) == 1
        corrected = mean is not None and bool(name) and constant and plain
        new = encode(exact, pair_safe=True, least=least, corrected=corrected)
        node.input[1] = self.weight(node.input[1], new, int(transposed))
        if not name or not constant:
            return
        if mean is not None and plain:
            bias = bias - correction(exact, new.values, mean, layer.groups)
        if name in self._decoders:
            node.input[2] = self.bias(name, bias, new.scales * np.float32(layer.step))
        else:
            node.input[2] = self.store(name, "corrected", bias.astype(np.float32))

    def _old(self, name: str) -> Array:
        """Return the real numbers of a stored or decoded tensor."""
        decoder = self._decoders.get(name)
        if (name if decoder is None else decoder.input[0]) not in self._stored:
            raise ModelError(f"{name!r} is computed, so its layer can't be repaired", remedy="Leave --repair out")
        if decoder is None:
            return numpy_helper.to_array(self._stored[name]).astype(np.float64)
        codes, scale, *zero = (
            numpy_helper.to_array(self._stored[part]).astype(np.float64) for part in decoder.input if part
        )
        axis = int(attributes(decoder).get("axis", 1)) % codes.ndim
        shape = [-1 if place == axis else 1 for place in range(codes.ndim)]
        parts = [part.reshape(shape) if part.size > 1 else part.reshape(-1)[0] for part in (scale, *zero)]
        return np.asarray((codes - (parts[1] if zero else 0.0)) * parts[0])
