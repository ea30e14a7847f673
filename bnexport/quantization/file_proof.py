"""Stage 1 for int8: prove that a QDQ file is its float32 file plus rounding, number by number, without running anything."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from bnexport.errors import BnexportError
from bnexport.onnx_files.models import mentions
from bnexport.quantization.codes import LARGEST, Coding, Range, coding_of, saturating_channels
from bnexport.quantization.int8_plan import QuantizationPlan, QuantizedLayer, casts_of_pixels, constants_stored
from bnexport.quantization.writer import is_guard
from bnexport.tensors import Array

#: A float32 scale carries a relative rounding of 6e-8; products of two and the quotient stay below.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Finding:
    """The result of one check: n numbers or nodes compared, and the reason of a failure, else what was found."""

    check: str
    passed: bool
    reason: str
    n: int


class _NotProved(Exception):
    """Carries the reason of a failed check."""


class Int8File:
    """A float32 file, the int8 file made from it, and the record of its making (``quantize.Int8Result``)."""

    def __init__(self, float_model: ModelProto, int8_model: ModelProto, record: Mapping[str, Any]) -> None:
        self.float_model, self.int8_model, self.record = constants_stored(float_model), int8_model, record
        self.stored = {tensor.name: tensor for tensor in int8_model.graph.initializer}
        self.decoders = {node.output[0]: node for node in int8_model.graph.node if node.op_type == "DequantizeLinear"}
        self.encoders = {node.output[0]: node for node in int8_model.graph.node if node.op_type == "QuantizeLinear"}
        self.casts = {source: name for name, source in casts_of_pixels(float_model).items()}
        self.ranges = {name: Range.from_json(value) for name, value in record["ranges"].items()}
        self.target = str(record["target"])

    def pixel_decoders(self) -> list[tuple[str, NodeProto]]:
        """Return each DequantizeLinear that reads pixels, with the output of the Cast in the float32 file that it replaces."""
        found = ((self.casts.get(decoder.input[0]), decoder) for decoder in self.decoders.values())
        return [(name, decoder) for name, decoder in found if name is not None]

    def array(self, name: str) -> Array:
        """Return a stored tensor."""
        if name not in self.stored:
            raise _NotProved(f"{name!r} is not stored in the file")
        return numpy_helper.to_array(self.stored[name])

    @functools.cached_property
    def plan(self) -> QuantizationPlan:
        """Return the layers and tensors that the record makes int8."""
        plan = QuantizationPlan(self.float_model, tuple(self.record["float_layers"]))
        plan.set_sizes(self.record.get("sizes", {}))
        return plan

    def layers(self) -> Iterator[tuple[QuantizedLayer, NodeProto, NodeProto, NodeProto | None]]:
        """Yield each int8 layer with the DequantizeLinear of its input, its weight and its bias, which a MatMul lacks."""
        nodes = {node.output[0]: node for node in self.int8_model.graph.node}
        for layer in self.plan.layers:
            node = nodes.get(layer.node.output[0])
            decoders = [] if node is None else [self.decoders.get(name) for name in node.input]
            found = [decoder for decoder in decoders if decoder is not None]
            if len(found) != (2 if layer.node.op_type == "MatMul" else 3):
                raise _NotProved(f"{layer.name} does not read codes of its input, weight and bias")
            yield layer, found[0], found[1], found[2] if len(found) > 2 else None

    def shift(self, layer: QuantizedLayer) -> Array:
        """Return the constant that the Add after a MatMul has in place of the float32 file's."""
        assert layer.shift is not None
        node = next(node for node in self.int8_model.graph.node if node.output[0] == layer.output)
        (name,) = (name for name in node.input if name in self.stored)
        return self.array(name).reshape(-1).astype(np.float64)


def findings(file: Int8File) -> list[Finding]:
    """Return every check of the file proof; a check that can't be made has failed."""
    found = []
    for name, check in _CHECKS.items():
        try:
            n, text = check(file)
            found.append(Finding(name, True, text, n))
        except _NotProved as failure:
            found.append(Finding(name, False, str(failure), 0))
        except (BnexportError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            found.append(Finding(name, False, f"it can't be read: {error}", 0))
    return found


def _structure(file: Int8File) -> tuple[int, str]:
    """Compare the graphs node by node, with QuantizeLinear, DequantizeLinear and guards removed."""
    before = file.float_model.graph
    original = {name for node in before.node for name in node.output}
    renamed = {}
    for name, decoder in file.decoders.items():
        encoder = file.encoders.get(decoder.input[0])
        renamed[name] = encoder.input[0] if encoder is not None else decoder.input[0]
    own = {name for layer in file.plan.layers for name in (layer.node.output[0], layer.output)}
    replaced = {name for name, _ in file.pixel_decoders()}
    renamed |= {decoder.output[0]: name for name, decoder in file.pixel_decoders()}
    nodes = [node for node in before.node if node.output[0] not in replaced]
    added = {*file.decoders, *file.encoders}
    for node in file.int8_model.graph.node:
        if is_guard(node, file.stored) and node.output[0] not in original:
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
            added.add(node.output[0])
    after = [node for node in file.int8_model.graph.node if node.output[0] not in added]
    if len(after) != len(nodes):
        raise _NotProved(f"without Q and DQ the file has {len(after)} nodes, the float32 file {len(nodes)}")
    weights = {tensor.name for tensor in before.initializer}
    for one, other in zip(after, nodes, strict=True):
        names = [renamed.get(name, name) for name in one.input]
        # A weight was replaced by its codes, which the next checks compare; a layer without a bias got one.
        plain = [name for name in names if name in weights or name not in file.stored]
        wanted = [name for name in other.input if name in plain or name not in weights]
        if other.output[0] not in own:
            plain, wanted = names, list(other.input)
        same = all(
            getattr(one, part) == getattr(other, part) for part in ("op_type", "domain", "name", "output", "attribute")
        )
        if not same or plain != wanted:
            raise _NotProved(
                f"{other.name or other.output[0]} ({other.op_type}) is another node than in the float32 file"
            )
    for tensor in before.initializer:
        kept = file.stored.get(tensor.name)
        if kept is not None and kept != tensor:
            raise _NotProved(f"{tensor.name!r} has other numbers than in the float32 file")
    for kind in ("input", "output"):
        if list(getattr(file.int8_model.graph, kind)) != list(getattr(before, kind)):
            raise _NotProved(f"the {kind}s are not those of the float32 file")
    count = mentions(file.int8_model.graph)
    if unused := [name for name in file.stored if not count[name]]:
        raise _NotProved(f"nothing reads {unused[0]!r}")
    return len(after), "without Q and DQ the graph is that of the float32 file, node by node"


def _weights(file: Int8File) -> tuple[int, str]:
    """Compare every decoded weight with the float32 weight: at most half a step apart, and no code clipped."""
    count = 0
    for layer, _, decoder, _ in file.layers():
        codes, scales = _weight(file, layer, decoder)
        exact = layer.outputs_first.astype(np.float64)
        steps = scales.astype(np.float64).reshape(-1, *(1,) * (exact.ndim - 1))
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise _NotProved(f"a scale of the weight of {layer.name} is not a positive number")
        off = np.abs(codes * steps - exact) > 0.5 * steps * (1 + _ROUNDING) + _ROUNDING * np.abs(exact)
        if off.any():
            channel = int(np.flatnonzero(off.reshape(len(off), -1).any(axis=1))[0])
            raise _NotProved(
                f"channel {channel} of the weight of {layer.name} is more than half a step off the float32 weight"
            )
        if np.abs(codes.astype(np.int64)).max(initial=0) > LARGEST:
            raise _NotProved(f"the weight of {layer.name} has the code -128")
        count += codes.size
    return count, f"{count} weights are within half a step of the float32 weights, no code is clipped"


def _biases(file: Int8File) -> tuple[int, str]:
    """Compare every decoded bias with the corrected one: at most half a step apart."""
    count = 0
    for layer, given, weight, bias in file.layers():
        codes, scales = _weight(file, layer, weight)
        rounded = codes * scales.astype(np.float64).reshape(-1, *(1,) * (codes.ndim - 1))
        wanted = layer.corrected_bias(rounded, file.ranges[layer.input].mean)
        if bias is None:
            count += _check_shift(file, layer, wanted)
            continue
        steps = file.array(bias.input[1]).astype(np.float64)
        product = float(file.array(given.input[1]).reshape(-1)[0]) * scales.astype(np.float64)
        if steps.shape != product.shape or (np.abs(steps - product) > _ROUNDING * product).any():
            raise _NotProved(f"the scale of the bias of {layer.name} is not that of its input times that of its weight")
        stored = file.array(bias.input[0])
        if stored.dtype != np.int32 or len(bias.input) > 2:
            raise _NotProved(f"the bias of {layer.name} is not int32 with its zero at 0")
        # The float32 scale of a bias with a large code is off by more than half a step of that code.
        room = 0.5 * steps * (1 + _ROUNDING) + _ROUNDING * np.abs(wanted)
        off = ~(np.abs(stored * steps - wanted) <= room)  # NaN is off, too
        if off.any():
            channel = int(np.flatnonzero(off)[0])
            raise _NotProved(
                f"the bias of {layer.name} is not the corrected one: channel {channel} is more than half a step off"
            )
        count += stored.size
    return count, f"{count} biases are within half a step of those corrected for the rounding of the weights"


def _check_shift(file: Int8File, layer: QuantizedLayer, wanted: Array) -> int:
    """Compare the constant after a MatMul with the corrected bias, up to float32's rounding; return how many numbers it has."""
    if layer.shift is None:
        return 0
    stored = file.shift(layer)
    if stored.shape != wanted.shape or not (np.abs(stored - wanted) <= _ROUNDING * np.abs(wanted)).all():
        raise _NotProved(f"the bias of {layer.name} is not the corrected one")
    return len(stored)


def _zeros(file: Int8File) -> tuple[int, str]:
    """Compare scale and zero point of every tensor with its recorded range, and each decoder with its encoder."""
    for decoder in file.decoders.values():
        encoder = file.encoders.get(decoder.input[0])
        if encoder is not None and list(decoder.input[1:]) != list(encoder.input[1:]):
            raise _NotProved(f"{decoder.output[0]} is decoded with another scale or zero than it was encoded with")
    for name, decoder in file.pixel_decoders():
        if (float(file.array(decoder.input[1])), int(file.array(decoder.input[2]))) != (1.0, 0):
            raise _NotProved(f"{name!r} is decoded from pixels with another scale than 1 or another zero than 0")
    named = {encoder.input[0]: encoder for encoder in file.encoders.values()} | dict(file.pixel_decoders())
    if odd := sorted(set(named) ^ set(file.ranges)):
        raise _NotProved(f"{odd[0]!r} has a range in the manifest and no codes in the file, or the reverse")
    for name, encoder in named.items():
        wanted = coding_of(name, file.ranges[name], file.target)
        scale, zero = file.array(encoder.input[1]).reshape(-1), file.array(encoder.input[2]).reshape(-1)
        if len(scale) != 1 or len(zero) != 1 or zero.dtype != wanted.zero_array.dtype:
            raise _NotProved(f"{name!r} does not have one scale and one zero point of the right type")
        if abs(float(scale[0]) - float(wanted.scale)) > _ROUNDING * float(wanted.scale):
            raise _NotProved(f"the scale of {name!r} is {scale[0]:.6g}, its range gives {wanted.scale:.6g}")
        if int(zero[0]) != wanted.zero:
            raise _NotProved(f"the zero point of {name!r} is {zero[0]}, its range gives {wanted.zero}")
        _check_reach(name, wanted, file.ranges[name])
    text = f"{len(named)} tensors have the scale and zero point of their recorded range; 0 has a code in each"
    return len(named), text


def _check_reach(name: str, coding: Coding, found: Range) -> None:
    ends = [float(coding.scale) * (end - coding.zero) for end in coding.limits]
    step = float(coding.scale)
    if ends[0] > min(found.low, 0.0) + step or ends[1] < max(found.high, 0.0) - step:
        raise _NotProved(f"the codes of {name!r} do not reach its range")


def _saturation(file: Int8File) -> tuple[int, str]:
    """Look for channels that can saturate 16 bits in some order of pairs."""
    channels, exempt = 0, []
    for layer, _, decoder, _ in file.layers():
        if layer.depthwise:
            exempt.append(layer.name)
            continue
        codes, _ = _weight(file, layer, decoder)
        unsafe = saturating_channels(codes)
        if unsafe.any():
            raise _NotProved(f"{int(unsafe.sum())} of {len(unsafe)} channels of {layer.name} can saturate 16-bit sums")
        channels += len(unsafe)
    text = f"none of {channels} channels can saturate 16-bit sums, in any order of products"
    return channels, text + (f"; {len(exempt)} depthwise layers are exempt" if exempt else "")


def _weight(file: Int8File, layer: QuantizedLayer, decoder: NodeProto) -> tuple[Array, Array]:
    """Return the codes of a weight, output channels first, and its scales (out,)."""
    codes, scales = file.array(decoder.input[0]), file.array(decoder.input[1])
    if codes.dtype != np.int8 or codes.shape != layer.weight.shape or scales.shape != (len(layer.bias),):
        raise _NotProved(
            f"the weight of {layer.name} is not stored as int8 codes of its shape with one scale per channel"
        )
    if len(decoder.input) > 2 and file.array(decoder.input[2]).any():
        raise _NotProved(f"the weight of {layer.name} has a zero point that is not 0")
    axis = next((item.i for item in decoder.attribute if item.name == "axis"), 1)
    if axis != layer.axis:
        raise _NotProved(f"the scales of the weight of {layer.name} lie along axis {axis}, expected {layer.axis}")
    return codes if layer.axis == 0 else codes.swapaxes(0, layer.axis), scales


_CHECKS: dict[str, Callable[[Int8File], tuple[int, str]]] = {
    "structure": _structure,
    "weights": _weights,
    "biases": _biases,
    "ranges": _zeros,
    "saturation": _saturation,
}
