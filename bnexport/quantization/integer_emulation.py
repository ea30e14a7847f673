"""Evaluate an int8 file as integer kernels do: with exact sums, with 16-bit saturation, or off by one last bit.

Kernels multiply codes and add the products in 32 bits, which is exact, and requantise the sum. In real numbers that is what
QuantizeLinear and DequantizeLinear around a float operator state, so the evaluation in float64 is the exact emulation. Kernels
that add neighbouring products in 16 bits (VPMADDUBSW) differ by what each pair loses. Neighbours are the next inputs along the
kernel's rows, columns and channels, channels last. Against ONNX Runtime both emulations are off by an rms of 0.0027 of scale
where saturation itself moves the outputs by 0.155.

ONNX Runtime computes a layer in integers only if its output is requantised, or if it is a matrix product (``_Fusion``).
It computes the other layers in float, where nothing saturates. Only its kernels for unsigned inputs add in 16 bits. On x86 it
changes signed codes with one reader into unsigned ones; its kernels for the remaining signed inputs add in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.onnx_files import kernels
from bnexport.onnx_files.float64 import Float64Evaluator, wide_evaluator, widen_array
from bnexport.onnx_files.models import attributes, read_model
from bnexport.quantization.codes import ABSORBED, MOVERS, is_depthwise, saturating_channels
from bnexport.tensors import Array

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

#: Ways of computing an int8 file; ``onnx_files.emulation.words_of`` has the words for the first two.
EXACT, SATURATING, LAST_BIT = "int8", "int8-saturating", "int8-last-bit"
WAYS = (EXACT, SATURATING, LAST_BIT)
_LARGEST, _SMALLEST = 32767.0, -32768.0
#: Two codes of inputs with at most this sum can't saturate: 255 * 128 < 32,767.
_HARMLESS = 255
#: Operators that ONNX Runtime removes, and operators across which it moves a QuantizeLinear to their input.
_REMOVED = ("Identity", "Dropout")
_CROSSED = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", *_REMOVED)
#: Largest change of a value before it is requantised, in steps.
_DITHER = 1 / 16


class IntegerEmulator(Float64Evaluator):
    """Evaluates an int8 file in one of WAYS.

    With another last bit, each value is moved by a random part of a sixteenth of a step before it is requantised, so that one
    code in about 30 is off by one: more than kernels that requantise in float32 or in fixed point disagree.

    Args:
        source: The file, its bytes, or the model read from it (which is not changed).
        way: One of WAYS.
        seed: Seed of the random parts.

    Raises:
        BundleError: Not a model, or one with an operator that onnx's reference implementation lacks.
    """

    def __init__(self, source: bytes | Path | ModelProto, way: str = EXACT, *, seed: int = 0) -> None:
        model = read_model(source) if isinstance(source, bytes | Path) else source
        super().__init__(model)
        self._seed, self._random = seed, np.random.default_rng(seed)
        nodes = zip(model.graph.node, self._engine.rt_nodes_, strict=True)
        if way == LAST_BIT:
            for node, runner in nodes:
                if node.op_type == "QuantizeLinear":
                    runner.run = self._dithered(runner.run)
        if way == SATURATING:
            layers = {layer.output: layer for layer in int8_layers(model) if layer.saturates}
            for node, runner in nodes:
                if node.output[0] in layers:
                    runner.run = _saturating(runner.run, layers[node.output[0]])

    def evaluate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return outputs in float64, the same for the same inputs; otherwise as ``Float64Evaluator.evaluate``."""
        self._random = np.random.default_rng(self._seed)
        return super().evaluate(feeds)

    def _dithered(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def dithered(x: Array, step: Array, *rest: Any) -> Any:
            return run(x + (self._random.random(x.shape) - 0.5) * (2 * _DITHER * step), step, *rest)

        return dithered


class Int8Layer:
    """A convolution, Gemm or MatMul of a QDQ file whose input and weight are decoded from codes.

    Attributes:
        node: The operator.
        output: Name of its output.
        codes: Weight codes (out, in / groups, *kernel), output channels first.
        scales: Scale of each output channel, or one for all.
        step: Scale of the input.
        zero: Code of the input's 0, as an unsigned byte.
        in_integers: ONNX Runtime computes it with integer kernels.
        unsigned: ONNX Runtime's kernel reads unsigned codes of the input.
        depthwise: Each output channel reads one input channel, which no other reads.
        unsafe: Channels that can saturate in some order of pairs (out,).
    """

    def __init__(
        self,
        node: NodeProto,
        codes: Array,
        scales: Array,
        step: float,
        zero: int,
        *,
        in_integers: bool,
        unsigned: bool,
    ) -> None:
        self.node, self.codes, self.scales, self.step, self.zero = node, codes, scales, step, zero
        self.output, self.in_integers, self.unsigned = str(node.output[0]), in_integers, unsigned
        self.groups = int(attributes(node).get("group", 1))
        self.depthwise = is_depthwise(self.groups, codes.shape)
        self.unsafe = np.zeros(len(codes), bool) if self.depthwise else saturating_channels(codes)

    @property
    def can_saturate(self) -> bool:
        """Return whether a channel can saturate in some order of pairs."""
        return bool(self.unsafe.any())

    @property
    def saturates(self) -> bool:
        """Return whether a channel can saturate in ONNX Runtime: its kernel computes in integers and reads unsigned codes."""
        return self.can_saturate and self.in_integers and self.unsigned

    def lost(self, x: Array) -> Array:
        """Return what 16-bit saturation takes from the outputs (n, out, *count) for decoded inputs x (n, in, *size)."""
        codes = (np.rint(x / self.step) + self.zero).astype(np.uint8)
        taps, shape = self._taps(codes)
        weights = np.moveaxis(self.codes, 1, -1).reshape(self.groups, -1, taps.shape[1]).astype(np.float32)
        found = np.stack([_excess(*pair) for pair in zip(taps, weights, strict=True)])  # (groups, out / groups, places)
        steps = self.step * np.broadcast_to(self.scales, (len(self.codes),))
        scaled = found.reshape(len(self.codes), *shape) * steps.reshape(-1, *(1,) * len(shape))
        return np.moveaxis(scaled, 0, 1 if self.node.op_type == "Conv" else -1)

    def _taps(self, codes: Array) -> tuple[Array, tuple[int, ...]]:
        """Return the inputs of each tap, channels last, (groups, taps * in / groups, places), and the shape of the places."""
        if self.node.op_type != "Conv":
            return codes.reshape(1, -1, codes.shape[-1]).transpose(0, 2, 1), codes.shape[:-1]
        axes = window_axes(self.node, codes.shape[2:], self.codes.shape[2:])
        pads = [(0, 0), (0, 0), *((axis.before, axis.after) for axis in axes)]
        padded = np.pad(codes, pads, constant_values=self.zero)
        view = np.lib.stride_tricks.sliding_window_view(
            padded, [axis.span for axis in axes], axis=tuple(range(2, codes.ndim))
        )
        strides = (slice(None, None, axis.stride) for axis in axes)
        view = view[(slice(None), slice(None), *strides, *(slice(None, None, axis.dilation) for axis in axes))]
        dims = len(axes)
        shape = (len(codes), *view.shape[2 : 2 + dims])
        parted = view.reshape(len(codes), self.groups, -1, *view.shape[2:])
        order = (1, *range(3 + dims, 3 + 2 * dims), 2, 0, *range(3, 3 + dims))
        return parted.transpose(order).reshape(self.groups, -1, int(np.prod(shape))), shape


def _excess(taps: Array, weights: Array) -> Array:
    """Return the sum of saturated pairs - the sum of pairs, (out, places), for codes (k, places) and weights (out, k)."""
    found = np.zeros((len(weights), taps.shape[1]))
    for at in range(0, taps.shape[0] - 1, 2):  # an odd last product has a partner of 0 and can't saturate
        first, second = weights[:, at], weights[:, at + 1]
        top = np.maximum(first, 0) + np.maximum(second, 0)
        low = np.minimum(first, 0) + np.minimum(second, 0)
        channels = np.flatnonzero((255 * top > _LARGEST) | (255 * low < _SMALLEST))
        one, other = taps[at].astype(np.float32), taps[at + 1].astype(np.float32)
        places = np.flatnonzero(one + other > _HARMLESS)
        if channels.size and places.size:
            sums = np.outer(first[channels], one[places]) + np.outer(second[channels], other[places])
            found[np.ix_(channels, places)] += np.clip(sums, _SMALLEST, _LARGEST) - sums
    return found


def _saturating(run: Callable[..., Any], layer: Int8Layer) -> Callable[..., Any]:
    def saturating(x: Array, *rest: Any) -> Any:
        (exact,) = run(x, *rest)
        return (exact + layer.lost(x),)

    return saturating


def int8_layers(model: ModelProto) -> list[Int8Layer]:
    """Return the layers of a QDQ file whose input and weight have codes, in the order of the graph."""
    from onnx import numpy_helper

    stored, fusion = {tensor.name: tensor for tensor in model.graph.initializer}, _Fusion(model)
    found = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
            continue
        given, weight = fusion.decoder(node), fusion.decoders.get(node.input[1])
        if given is None or weight is None or not {*weight.input, *given.input[1:]} - {""} <= stored.keys():
            continue
        codes = numpy_helper.to_array(stored[weight.input[0]])
        scales = numpy_helper.to_array(stored[weight.input[1]]).astype(np.float64).reshape(-1)
        if codes.dtype != np.int8 or codes.ndim < 2 or (codes.ndim > 2 and node.op_type != "Conv"):
            continue
        step = float(numpy_helper.to_array(stored[given.input[1]]).reshape(-1)[0])
        zero = numpy_helper.to_array(stored[given.input[2]]).reshape(-1)[0] if len(given.input) > 2 else np.uint8(0)
        code = int(zero) + (128 if zero.dtype == np.int8 else 0)  # kernels shift signed inputs by 128
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB", 0))
        codes = codes.T if transposed else codes
        wide = zero.dtype.itemsize > 1
        takes, unsigned = not wide and fusion.takes(node), fusion.unsigned(node)
        layer = Int8Layer(node, codes, scales, step, code, in_integers=takes, unsigned=unsigned)
        if wide:  # no instruction for bytes multiplies codes of 16 bits
            layer.unsafe = np.zeros_like(layer.unsafe)
        found.append(layer)
    return found


def rounded_float_layers(model: ModelProto) -> list[NodeProto]:
    """Return the layers of a QDQ file whose float weight ONNX Runtime rounds to int8, with one scale for all channels.

    It does so where codes are in front of a layer and behind it.
    """
    fusion = _Fusion(model)
    return [node for node in model.graph.node if fusion.rounds(node)]


def window_axes(node: NodeProto, size: Sequence[int], kernel: Sequence[int]) -> tuple[kernels.WindowAxis, ...]:
    """Return the windows of a Conv along each axis of an input of this size."""
    found = attributes(node)
    return kernels.axes_of(
        size, kernel, strides=found.get("strides"), pads=found.get("pads"), dilations=found.get("dilations"),
        auto_pad=found.get("auto_pad", b"NOTSET").decode(),
    )  # fmt: skip


class _Fusion:
    """ONNX Runtime's choice of the layers that it computes in integers, on x86.

    Source: qdq_selectors.cc, qdq_propagation.cc, qdq_s8_to_u8.cc, ensure_unique_dq_for_node_unit.cc, pad_fusion.cc, and
    weight_bias_quantization.cc of 1.31.
    """

    def __init__(self, model: ModelProto) -> None:
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {value.name for value in model.graph.output}
        self.decoders = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
        self._makers = {str(name): node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def _source(self, node: NodeProto) -> str:
        """Return the tensor that a layer reads, also in front of a Pad that ONNX Runtime makes a part of a convolution."""
        pad = self._makers.get(node.input[0])
        if node.op_type != "Conv" or pad is None or pad.op_type != "Pad" or not pad.input or not self._joins(pad, node):
            return str(node.input[0])
        return str(pad.input[0])

    def _joins(self, pad: NodeProto, conv: NodeProto) -> bool:
        """Return whether a Pad adds only zeros around images, for this convolution alone."""
        settings = attributes(pad)
        added, value = settings.get("pads"), settings.get("value", 0.0)
        if len(pad.input) > 1:  # operator set 11 or newer
            added = self._array(pad.input[1]).reshape(-1).tolist() if pad.input[1] in self._stored else None
            value = self._number(pad.input[2], 0.0) if len(pad.input) > 2 else 0.0
        if self._only_reader(pad.output[0]) is None or len(pad.input) > 3 or not added or value != 0:
            return False
        half = len(added) // 2
        images = min(added) >= 0 and not any((*added[:2], *added[half : half + 2]))
        explicit = attributes(conv).get("auto_pad", b"NOTSET") == b"NOTSET"
        return settings.get("mode", b"constant") == b"constant" and images and explicit

    def decoder(self, node: NodeProto) -> NodeProto | None:
        """Return the DequantizeLinear of a layer's input, also in front of operators across which ONNX Runtime moves it."""
        name, seen = self._source(node), set[str]()  # the order of the nodes is not checked, so they may form a cycle
        while (maker := self._makers.get(name)) is not None and maker.op_type in _CROSSED and maker.input:
            if name in seen:
                return None
            seen.add(name)
            name = str(maker.input[0])
        return maker if maker is not None and maker.op_type == "DequantizeLinear" else None

    def takes(self, node: NodeProto) -> bool:
        """Return whether a layer with codes of input and weight is computed in integers.

        One QuantizeLinear has to read the output, perhaps behind a ReLU or Clip that cuts nothing from the codes. The output of
        a matrix product may also stay in float, without such an operator behind it. A constant float bias gets codes only in
        front of a QuantizeLinear. The weight of a Gemm needs a stored zero point. The codes of input and output need one type:
        unsigned, unless the layer is a Gemm. Their scales are one number. Without a QuantizeLinear behind them, a
        MatMul and the Add of a stored bias become a Gemm in float.
        """
        coder, after = self._coder(node.output[0]), self._only_reader(node.output[0])
        end = str(node.output[0])
        if after is not None and after.op_type in ABSORBED and self._only_reader(after.output[0]) is not None:
            end = str(after.output[0])
            coder = self._coder(end)
            if coder is None or self._size(coder.input[1]) > 1 or not self._cuts_nothing(after, coder):
                return False
        elif coder is None and (node.op_type == "Conv" or self._joins_sum(node, after)):
            return False
        given = self.decoder(node)
        if any(self._size(item.input[1]) > 1 for item in (coder, given) if item is not None):
            return False
        unsigned = self.unsigned(node)
        if coder is not None and unsigned != self._unsigned_output(end, coder):
            return False
        if not unsigned and node.op_type != "Gemm":
            return False
        bias = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "Gemm" and len(self.decoders[node.input[1]].input) < 3:
            return False
        return not bias or bias in self.decoders or (coder is not None and bias in self._stored)

    def rounds(self, node: NodeProto) -> bool:
        """Return whether ONNX Runtime rounds the stored float32 weight of a layer to int8."""
        from onnx import TensorProto

        weight = self._stored.get(node.input[1]) if node.op_type in ("Conv", "ConvTranspose", "Gemm") else None
        if weight is None or weight.data_type != TensorProto.FLOAT:
            return False
        given, bias = self.decoder(node), node.input[2] if len(node.input) > 2 else ""
        if given is None or self._size(given.input[1]) > 1 or (bias and bias not in self._stored):
            return False
        behind = self._behind(self._behind(str(node.output[0]), (*ABSORBED, *_REMOVED)), _CROSSED)
        readers = self._readers.get(behind, [])
        return len(readers) == 1 and readers[0].op_type == "QuantizeLinear"

    def _behind(self, name: str, operators: tuple[str, ...]) -> str:
        """Return the tensor behind a chain of operators, each of which is the only reader of the one before."""
        seen = set[str]()
        while name not in seen and len(readers := self._readers.get(name, [])) == 1 and readers[0].op_type in operators:
            seen.add(name)
            name = str(readers[0].output[0])
            if name in self._outputs and operators is _CROSSED:  # a QuantizeLinear crosses no output of the graph
                return ""
        return name

    def _joins_sum(self, node: NodeProto, after: NodeProto | None) -> bool:
        """Return whether a MatMul becomes a Gemm in float: an Add of a stored vector follows, and no QuantizeLinear."""
        if (
            node.op_type != "MatMul"
            or after is None
            or after.op_type != "Add"
            or self._coder(after.output[0]) is not None
        ):
            return False
        biases = [list(self._stored[name].dims) for name in after.input if name in self._stored]
        return biases == [list(self._stored[self.decoders[node.input[1]].input[0]].dims)[1:]]

    def unsigned(self, node: NodeProto) -> bool:
        """Return whether the kernel of a layer reads unsigned codes of its input.

        ONNX Runtime makes a DequantizeLinear for each reader, and changes signed codes that one DequantizeLinear reads.
        """
        name, decoder = self._source(node), self.decoder(node)
        if decoder is None or self._stored_unsigned(decoder):
            return True
        if decoder.output[0] == name:
            return self._decoded_once(decoder.input[0])
        readers = [reader for reader in self._readers[name] if reader.op_type != "QuantizeLinear"]
        return len(readers) + (name in self._outputs) == 1

    def _unsigned_output(self, name: str, coder: NodeProto) -> bool:
        """Return whether ONNX Runtime makes unsigned codes of a tensor; in front of moved numbers one operator reads them."""
        return self._stored_unsigned(coder) or coder.input[0] != name or self._decoded_once(coder.output[0])

    def _stored_unsigned(self, coder: NodeProto) -> bool:
        name = coder.input[2] if len(coder.input) > 2 else ""
        return name not in self._stored or self._array(name).dtype != np.int8

    def _decoded_once(self, codes: str) -> bool:
        """Return whether a QuantizeLinear makes these codes, and one DequantizeLinear for one reader reads them."""
        maker, decoders = self._makers.get(codes), self._readers.get(codes, [])
        if maker is None or codes in self._outputs or {node.op_type for node in decoders} != {"DequantizeLinear"}:
            return False
        names = [node.output[0] for node in decoders]
        uses = sum(len(self._readers.get(name, [])) + (name in self._outputs) for name in names)
        return maker.op_type == "QuantizeLinear" and uses == 1

    def _only_reader(self, name: str) -> NodeProto | None:
        found = self._readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self._outputs else None

    def _coder(self, name: str) -> NodeProto | None:
        """Return the only QuantizeLinear behind a tensor, perhaps behind operators that only move numbers."""
        found, seen = self._only_reader(name), set[str]()
        while found is not None and found.op_type in _CROSSED and found.output[0] not in seen:
            seen.add(found.output[0])
            found = self._only_reader(found.output[0])
        return found if found is not None and found.op_type == "QuantizeLinear" and len(found.input) > 1 else None

    def _cuts_nothing(self, clip: NodeProto, coder: NodeProto) -> bool:
        """Return whether a ReLU or Clip changes no value that the codes represent."""
        scale = self._number(coder.input[1], 0.0)
        name = coder.input[2] if len(coder.input) > 2 else ""
        if name and name not in self._stored:
            return False
        zero = self._array(name) if name else np.zeros(1, np.uint8)
        if zero.dtype.kind not in "iu":  # 8-bit floats
            return False
        limits, code = np.iinfo(zero.dtype), int(zero.reshape(-1)[0])
        if clip.op_type == "Relu":
            return code == limits.min
        settings, given = attributes(clip), [*clip.input[1:], "", ""]
        low = self._number(given[0], settings.get("min", -np.inf))
        high = self._number(given[1], settings.get("max", np.inf))
        return scale > 0 and np.rint(low / scale) + code <= limits.min and np.rint(high / scale) + code >= limits.max

    def _number(self, name: str, otherwise: float) -> float:
        """Return a stored number; NaN where it is computed, so that no comparison holds."""
        if not name:
            return otherwise
        array = self._array(name).reshape(-1) if name in self._stored else np.empty(0)
        return float(array[0]) if array.size else float("nan")

    def _size(self, name: str) -> int:
        return int(np.prod(self._stored[name].dims)) if name in self._stored else 1

    def _array(self, name: str) -> Array:
        from onnx import numpy_helper

        return numpy_helper.to_array(self._stored[name])


class OneLayerEmulator:
    """Evaluates a float32 model in float64 with one layer at a time in int8, on fixed inputs.

    A layer in int8 has the weights and the bias of the int8 file, and reads the codes of its input. The rounding of a tensor
    counts for the first int8 layer that reads it, else for the layer that computes it.

    Args:
        model: The float32 model.
        int8: The QDQ model that was made from it.
        feeds: Input name -> (n, ...).

    Attributes:
        layers: Output of each int8 layer -> its node in the float32 model, in the order of the graph.
        values: Tensor -> its value in float64.
        coded: Tensors with codes.
    """

    def __init__(self, model: ModelProto, int8: ModelProto, feeds: Mapping[str, Array]) -> None:
        engine: Any = wide_evaluator(model)
        self._nodes = list(zip(model.graph.node, engine.rt_nodes_, strict=True))
        self._outputs = [value.name for value in model.graph.output]
        given = {name: widen_array(array) for name, array in feeds.items()}
        with np.errstate(all="ignore"):
            self.values: dict[str, Any] = {**engine.rt_inits_, **given, **engine.run(None, given, intermediate=True)}
        self._coders: dict[str, Callable[[Array], Array]] = {}
        self._weights: dict[str, dict[int, Array]] = {}  # Output -> place of an input -> what the int8 file has there
        found = {layer.output for layer in int8_layers(int8)}
        self.layers = {node.output[0]: node for node, _ in self._nodes if node.output[0] in found}
        self._read(int8)
        self.coded = tuple(self._coders)
        makers = {str(name): node for node, _ in self._nodes for name in node.output}
        self._owners = {name: self._reader(name) or self._maker(name, makers) for name in self.coded}
        self._parts = {name: self._maker(name, makers) for name in self._weights}  # the Add after a MatMul, too

    def _read(self, int8: ModelProto) -> None:
        """Read the coders of tensors and the decoded weights from the int8 file."""
        engine: Any = wide_evaluator(int8)
        stored, decoders = dict(engine.rt_inits_), dict[str, Callable[[Array], Array]]()
        nodes = list(zip(int8.graph.node, engine.rt_nodes_, strict=True))
        for node, runner in nodes:
            if node.op_type == "DequantizeLinear":
                rest = [stored[name] for name in node.input[1:] if name]
                if node.input[0] in stored:
                    stored[node.output[0]] = runner.run(stored[node.input[0]], *rest)[0]
                else:
                    decoders[node.input[0]] = _bound(runner, rest)
        for node, runner in nodes:
            if node.op_type == "QuantizeLinear" and node.output[0] in decoders:
                encode = _bound(runner, [stored[name] for name in node.input[1:] if name])
                self._coders[node.input[0]] = _chained(encode, decoders[node.output[0]])
        before = {node.output[0]: list(node.input) for node, _ in self._nodes}
        for node, _ in nodes:
            old = before.get(node.output[0], list(node.input))
            new = {place: stored[name] for place, name in enumerate(node.input) if name in stored and name not in old}
            if new:
                self._weights[node.output[0]] = new

    def _reader(self, name: str) -> str:
        """Return the first layer that reads the codes of a tensor, also through operators that move numbers; "" for none."""
        for node, _ in self._nodes:
            if name in node.input[:1]:
                found = node.output[0]
                if found not in self.layers:
                    found = self._reader(found) if node.op_type in MOVERS else ""
                if found:
                    return str(found)
        return ""

    def _maker(self, name: str, makers: Mapping[str, NodeProto]) -> str:
        """Return the layer that computes a tensor, also before its bias and ReLU; "" for none."""
        while name in makers and name not in self.layers and makers[name].op_type in (*ABSORBED, "Add"):
            name = next((given for given in makers[name].input if given in makers), "")
        return name if name in self.layers else ""

    def own(self, layer: str) -> float:
        """Return the rms error of a layer's output over its rms, with this layer alone in int8."""
        node, runner = next(item for item in self._nodes if item[0].output[0] == layer)
        exact = self.values[layer]
        found = runner.run(*self._inputs(node, {}, layer))[0]
        return float(np.sqrt(((found - exact) ** 2).mean() / max((exact**2).mean(), np.finfo(np.float64).tiny)))

    def noise(self, layer: str) -> float:
        """Return the noise power of the model's outputs, of scale, with one layer in int8."""
        changed: dict[str, Any] = {}
        for name in self.coded:
            if self._owners[name] == layer and all(name not in node.output for node, _ in self._nodes):
                changed[name] = self._coders[name](self.values[name])  # an input of the model
        for node, runner in self._nodes:
            out = node.output[0]
            if self._parts.get(out) == layer or any(name in changed for name in node.input):
                with np.errstate(all="ignore"):
                    changed.update(zip(node.output, runner.run(*self._inputs(node, changed, layer)), strict=False))
            if out in self._coders and self._owners[out] == layer:
                changed[out] = self._coders[out](changed[out] if out in changed else self.values[out])
        return self.power({name: changed.get(name, self.values[name]) for name in self._outputs})

    def power(self, outputs: Mapping[str, Array]) -> float:
        """Return the noise power of outputs, of scale, summed over the outputs."""
        total = 0.0
        for name in self._outputs:
            exact = self.values[name]
            scale = max(float(np.abs(exact).max(initial=0.0)), np.finfo(np.float64).tiny)
            total += float((((outputs[name] - exact) / scale) ** 2).mean())
        return total

    def _inputs(self, node: NodeProto, changed: Mapping[str, Any], layer: str) -> list[Any]:
        """Return the inputs of a node: changed ones, and what the int8 file has if the node belongs to the layer."""
        found: list[Any] = [changed.get(name, self.values.get(name)) if name else None for name in node.input]
        out = node.output[0]
        if out == layer and node.input[0] in self._coders:
            found[0] = self._coders[node.input[0]](found[0])
        if self._parts.get(out) == layer:
            for place, array in self._weights[out].items():
                found += [None] * (place + 1 - len(found))  # a layer without a bias got one
                found[place] = array
        return found


def _bound(runner: Any, rest: list[Array]) -> Callable[[Array], Array]:
    return lambda x: np.asarray(runner.run(x, *rest)[0])


def _chained(first: Callable[[Array], Array], second: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: second(first(x))
