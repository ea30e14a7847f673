"""Average pooling by convolutions, for layers with few channels: the places of a pool's window become channels.

::

    Conv 6 channels, 5x5             -> activation -> AveragePool 2x2
    Conv 24 channels, 6x6, stride 2  -> activation -> Conv 6 channels, 1x1, weights 1/4

CPU kernels compute 8 or 16 channels at once (blocked layouts: ONNX Runtime's NCHWc, oneDNN's nChw16c), so 6 channels cost as
much as 8 or 16 in the convolution and in the activation. 24 channels fill the blocks. ONNX Runtime also leaves its layout for a
pooling of 6 channels. The sums are those of the original in another order. The new weights are exact, because a window has
2, 4, 8, ... places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bnexport.onnx_files.models import Names, attributes, mentions, put_initializers, refill

#: Number of float32 values in an AVX-512 register.
_LANES = 16
#: Elementwise operators without weights per channel.
_ACTIVATIONS = (
    "Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Selu", "Sigmoid", "Softplus",
    "Softsign", "Tanh", "ThresholdedRelu",
)  # fmt: skip


class _Place(NamedTuple):
    """A convolution, the average pooling that reads its activation, and the values from one to the other."""

    conv: NodeProto
    pool: NodeProto
    values: tuple[str, ...]


def pack_pools(model: ModelProto) -> int:
    """Rewrite every average pooling of the main graph for which that costs no more multiplications; return their number.

    The model is valid and changed in place; inputs and outputs stay. An infinite input, or a channel that overflows to
    infinity, makes all channels NaN at its place of the pooled output.
    """
    listed = {value.name for value in model.graph.input} if model.ir_version >= 4 else set()  # they can be replaced
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in listed}
    places, names = [*_places(model, weights)], Names(model)
    for place in places:
        _rewrite(model, place, weights, names)
    if places:
        read, changed = mentions(model.graph), {name for place in places for name in place.values}
        for group in (model.graph.initializer, model.graph.input):
            refill(group, [item for item in group if item.name not in weights or read[item.name]])
        refill(model.graph.value_info, [item for item in model.graph.value_info if item.name not in changed])
    return len(places)


def _places(model: ModelProto, weights: Mapping[str, TensorProto]) -> Iterator[_Place]:
    producers, read = {name: node for node in model.graph.node for name in node.output}, mentions(model.graph)
    for pool in model.graph.node:
        node, values = pool, list[str]()
        while _is(node, *(_ACTIVATIONS if values else ["AveragePool"])) and read[node.input[0]] == 1:
            values.append(node.input[0])
            node = producers.get(values[-1], NodeProto())
        if _is(node, "Conv") and values and _pays(node, pool, weights):
            yield _Place(node, pool, tuple(values))


def _pays(conv: NodeProto, pool: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """Return True if the two nodes can be rewritten without more multiplications."""
    given, pooling = attributes(conv), attributes(pool)
    window, strides = pooling["kernel_shape"], given.get("strides", (1, 1))
    plain = (
        all(name in weights for name in conv.input[1:] if name)
        and len(window) == 2
        and given.get("group", 1) == 1
        and all(item.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID") for item in (given, pooling))
        and {*given.get("dilations", ()), *pooling.get("dilations", ())} <= {1}
        and pooling.get("strides", (1, 1)) == window
        and not any(pooling.get("pads", ()))
        and not pooling.get("ceil_mode", 0)
    )
    count = math.prod(window)
    if not plain or count < 2 or count & (count - 1):
        return False
    channels, _, *kernel = weights[conv.input[1]].dims
    before = _filled(channels) * math.prod(kernel)
    return bool(_filled(channels * count) * math.prod(_reach(kernel, strides, window)) <= before * count)


def _filled(channels: int) -> int:
    return -(-channels // _LANES) * _LANES


def _reach(kernel: Sequence[int], strides: Sequence[int], window: Sequence[int]) -> list[int]:
    """Return the size of a kernel that reaches every place of a window."""
    return [size + stride * (more - 1) for size, stride, more in zip(kernel, strides, window, strict=True)]


def _rewrite(model: ModelProto, place: _Place, weights: Mapping[str, TensorProto], names: Names) -> None:
    conv, window = place.conv, attributes(place.pool)["kernel_shape"]
    strides, (rows, columns) = attributes(conv).get("strides", (1, 1)), window
    weight, *bias = (numpy_helper.to_array(weights[name]) for name in conv.input[1:] if name)
    channels, inputs, *kernel = weight.shape
    reach = _reach(kernel, strides, window)
    packed = np.zeros((rows, columns, channels, inputs, *reach), weight.dtype)
    for row, column in itertools.product(range(rows), range(columns)):
        top, left = row * strides[0], column * strides[1]
        packed[row, column, :, :, top : top + kernel[0], left : left + kernel[1]] = weight
    count = rows * columns
    mean = np.tile(np.eye(channels) / count, count)[:, :, np.newaxis, np.newaxis].astype(weight.dtype)
    stacked = [packed.reshape(count * channels, inputs, *reach), *(np.tile(array, count) for array in bias)]
    called = [names.free(name, "packed") for name in conv.input[1:] if name]
    share = names.free(place.pool.output[0], "mean")
    tensors = dict(zip([*called, share], [*stacked, mean], strict=True))
    put_initializers(model, {name: numpy_helper.from_array(array, name) for name, array in tensors.items()})
    _become_conv(
        conv, [conv.input[0], *called], reach, [stride * size for stride, size in zip(strides, window, strict=True)]
    )
    _become_conv(place.pool, [place.pool.input[0], share], [1, 1], [1, 1])


def _become_conv(node: NodeProto, inputs: Sequence[str], kernel: Sequence[int], strides: Sequence[int]) -> None:
    given = attributes(node)
    pads = (0, 0, 0, 0) if given.get("auto_pad") == b"VALID" else given.get("pads", (0, 0, 0, 0))
    node.op_type = "Conv"
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    made = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in made.items())


def _is(node: NodeProto, *operators: str) -> bool:
    return node.op_type in operators and node.domain in ("", "ai.onnx")
