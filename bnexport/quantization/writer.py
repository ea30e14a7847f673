"""Write a float32 graph with QuantizeLinear and DequantizeLinear around its int8 layers.

Every reader has a separate DequantizeLinear, since engines fuse a layer only with one that nothing else reads. Nodes stay in
the order of the graph, names and bytes are the same for the same input, and onnx.checker accepts the file. ``repaired`` rounds
the weights of an existing int8 file again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from bnexport.errors import ExportError, ModelError
from bnexport.onnx_files.models import attributes, opset_of, refill
from bnexport.onnx_files.names import Names, mentions
from bnexport.optional import one_line
from bnexport.quantization.codes import Coding, Range, coding_of, correction, encode, encode_bias, least_scales
from bnexport.quantization.int8_audit import as_qdq, dynamic_risks
from bnexport.quantization.int8_plan import OLDEST_OPSET, QuantizationPlan, QuantizedLayer
from bnexport.quantization.integer_emulation import Int8Layer, int8_layers
from bnexport.tensors import Array


@dataclass(frozen=True)
class LayerCodes:
    """The stored numbers of one int8 layer: weight codes with output channels first, scales (out,), bias codes (out,)."""

    codes: Array
    scales: Array
    bias: Array
    bias_scales: Array


def layer_codes(layer: QuantizedLayer, coding: Coding, mean: Sequence[float]) -> LayerCodes:
    """Return the stored numbers of a layer; the file proof repeats this computation.

    Args:
        layer: The float32 layer.
        coding: Of its input.
        mean: E[x] of each input channel, or one number for all.
    """
    exact = layer.outputs_first.astype(np.float64)
    step = float(coding.scale)
    means = np.asarray(mean, np.float64)
    least = least_scales(layer.bias, step)
    found = encode(exact, pair_safe=not layer.depthwise, least=least)
    bias = layer.bias - correction(exact, found.values, means, layer.groups)
    scales = found.scales * coding.scale  # float32, as the file keeps them
    return LayerCodes(found.codes, found.scales, encode_bias(bias, scales), scales)


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
    writer = _Writer(plan, codings, ranges)
    model = writer.write()
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's and the shape inference's errors share no base class
        raise ExportError(
            f"the int8 file is not valid ONNX: {one_line(error)}", remedy="Report it with the model"
        ) from error
    return model


class _Writer:
    def __init__(self, plan: QuantizationPlan, codings: Mapping[str, Coding], ranges: Mapping[str, Range]) -> None:
        self._plan, self._codings, self._ranges = plan, codings, ranges
        self._model = ModelProto()
        self._model.CopyFrom(plan.model)
        self._names = Names(plan.model)
        self._layers = {layer.node.output[0]: layer for layer in plan.layers}
        self._codes: dict[str, tuple[str, str, str]] = {}
        self._nodes: list[NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []

    def write(self) -> ModelProto:
        graph = self._model.graph
        for value in graph.input:
            self._quantise(value.name)
        for node in list(graph.node):
            if not self._pixels_are_codes(node):
                self._node(node)
                for name in node.output:
                    self._quantise(name)
        refill(graph.node, self._nodes)
        graph.initializer.extend(self._tensors)
        count = mentions(graph)
        refill(graph.initializer, [tensor for tensor in graph.initializer if count[tensor.name]])
        del graph.value_info[:]
        return self._model

    def _node(self, node: NodeProto) -> None:
        copy = NodeProto()
        copy.CopyFrom(node)
        layer = self._layers.get(node.output[0]) if node.output else None
        for place, name in enumerate(node.input):
            if name in self._codes:
                copy.input[place] = self._dequantised(name)
        if layer is not None:
            names = self._weights(layer)
            del copy.input[1:]
            copy.input.extend(names)
        self._nodes.append(copy)

    def _pixels_are_codes(self, node: NodeProto) -> bool:
        """Return whether the codes of a Cast's output are the pixels that it reads: then readers decode these instead."""
        name = str(node.output[0]) if node.output else ""
        coding = self._codings.get(name) if name in self._plan.pixels else None
        if coding is None or not coding.is_plain or name in self._plan.outputs:
            return False
        scale, zero = self._store(name, "scale", np.array(coding.scale)), self._store(name, "zero", coding.zero_array)
        self._codes[name] = (self._plan.pixels[name], scale, zero)
        return True

    def _quantise(self, name: str) -> None:
        coding = self._codings.get(name)
        if coding is None:
            return
        scale, zero = self._store(name, "scale", np.array(coding.scale)), self._store(name, "zero", coding.zero_array)
        codes = self._names.free(name, "codes")
        self._add("QuantizeLinear", [name, scale, zero], codes)
        self._codes[name] = (codes, scale, zero)

    def _dequantised(self, name: str) -> str:
        codes, scale, zero = self._codes[name]
        value = self._names.free(name, "decoded")
        self._add("DequantizeLinear", [codes, scale, zero], value)
        return value

    def _weights(self, layer: QuantizedLayer) -> tuple[str, str]:
        """Store the codes of a layer's weight and bias, and return the names of their decoded values."""
        coding = self._codings[layer.input]
        found = layer_codes(layer, coding, self._ranges[layer.input].mean)
        name = str(layer.node.input[1])
        bias = str(layer.node.input[2]) if len(layer.node.input) > 2 and layer.node.input[2] else f"{name}_bias"
        codes = self._store(name, "codes", np.ascontiguousarray(layer.stored(found.codes)))
        zeros = self._store(name, "zero", np.zeros(len(found.scales), np.int8))
        scales = self._store(name, "scale", found.scales)
        weight = self._names.free(name, "decoded")
        self._add("DequantizeLinear", [codes, scales, zeros], weight, axis=layer.axis)
        shift = self._names.free(bias, "decoded")
        inputs = [self._store(bias, "codes", found.bias), self._store(bias, "scale", found.bias_scales)]
        self._add("DequantizeLinear", inputs, shift, axis=0)
        return weight, shift

    def _store(self, name: str, what: str, array: Array) -> str:
        free = self._names.free(name, what)
        self._tensors.append(numpy_helper.from_array(array, free))
        return free

    def _add(self, operator: str, inputs: Sequence[str], output: str, **settings: Any) -> None:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **settings))


# --- repair of an existing file -----------------------------------------------------------------------------------------------


def repaired(model: ModelProto, means: Mapping[str, Array] | None = None) -> ModelProto:
    """Return the model in the QDQ form with weights of which no channel can saturate.

    Each layer with a saturating channel is rounded again, from its decoded weights, with one scale per output channel.

    Args:
        model: An int8 model, which is not changed.
        means: Layer's output -> E[x] of each input channel, by which the bias is corrected; None: the bias keeps its value.

    Raises:
        ModelError: The model can't be repaired: dynamic scales, an operator set before 13, nothing to repair.
    """
    if (opset := opset_of(model)) < OLDEST_OPSET:
        raise ModelError(
            f"the file has operator set {opset}; scales per channel need {OLDEST_OPSET}",
            remedy=f"Convert the float32 file to operator set {OLDEST_OPSET} and quantise it again",
        )
    result = as_qdq(model)
    if any(risk.saturating for risk in dynamic_risks(result)):
        raise ModelError("layers with scales of run time can't be repaired", remedy="Quantise the network statically")
    layers = {layer.output: layer for layer in int8_layers(result) if layer.can_saturate}
    if not layers:
        raise ModelError("no channel can saturate, so there is nothing to repair", remedy="Leave --repair out")
    repair = _Repair(result)
    written: list[NodeProto] = []
    for node in result.graph.node:
        if node.output[0] in layers:
            layer = layers[node.output[0]]
            written += repair.layer(layer, node, (means or {}).get(layer.output))
        written.append(node)
    refill(result.graph.node, written)
    result.graph.initializer.extend(repair.tensors)
    _drop_unread(result)
    del result.graph.value_info[:]
    try:
        onnx.checker.check_model(result, full_check=True)
    except Exception as error:  # the checker's and the shape inference's errors share no base class
        raise ModelError(f"the repaired file is not valid ONNX: {one_line(error)}", remedy="Report it") from error
    return result


class _Repair:
    """Rounds layers again; ``tensors`` are the new numbers."""

    def __init__(self, model: ModelProto) -> None:
        self.tensors: list[onnx.TensorProto] = []
        self._names = Names(model)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._decoders = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}

    def layer(self, layer: Int8Layer, node: NodeProto, mean: Array | None) -> list[NodeProto]:
        """Connect a layer to new weights, and return the nodes that decode them."""
        old = self._decoded(node.input[1])
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB", 0))
        exact = old.T if transposed else old
        name = node.input[2] if len(node.input) > 2 else ""
        bias = self._decoded(name).reshape(-1) if name else np.zeros(len(exact))
        constant = len(bias) == len(exact)
        new = encode(exact, pair_safe=True, least=least_scales(bias, layer.step) if constant else None)
        codes = self._store(node.input[1], "codes", np.ascontiguousarray(new.codes.T if transposed else new.codes))
        zero = self._store(node.input[1], "zero", np.zeros(len(exact), np.int8))
        scales = self._store(node.input[1], "scale", new.scales)
        weight = self._names.free(node.input[1], "decoded")
        nodes = [helper.make_node("DequantizeLinear", [codes, scales, zero], [weight], axis=int(transposed))]
        node.input[1] = weight
        if not name or not constant:
            return nodes
        plain = attributes(node).get("alpha", 1.0) == 1 and attributes(node).get("beta", 1.0) == 1
        if mean is not None and plain:
            bias = bias - correction(exact, new.values, mean, layer.groups)
        if name not in self._decoders:
            node.input[2] = self._store(name, "corrected", bias.astype(np.float32))
            return nodes
        steps = new.scales * np.float32(layer.step)
        shift = self._names.free(name, "decoded")
        inputs = [self._store(name, "codes", encode_bias(bias, steps)), self._store(name, "scale", steps)]
        node.input[2] = shift
        return [*nodes, helper.make_node("DequantizeLinear", inputs, [shift], axis=0)]

    def _decoded(self, name: str) -> Array:
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

    def _store(self, name: str, what: str, array: Array) -> str:
        free = self._names.free(name, what)
        self.tensors.append(numpy_helper.from_array(array, free))
        return free


def _drop_unread(model: ModelProto) -> None:
    """Drop DequantizeLinear nodes and stored tensors that nothing reads."""
    count = mentions(model.graph)
    kept = [node for node in model.graph.node if node.op_type != "DequantizeLinear" or count[node.output[0]]]
    refill(model.graph.node, kept)
    count = mentions(model.graph)
    refill(model.graph.initializer, [tensor for tensor in model.graph.initializer if count[tensor.name]])
