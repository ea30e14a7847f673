"""Constant targets for Reshape nodes whose target is computed from sizes.

torch.export writes ``x.flatten(1)`` as Shape, Squeeze, Concat and Reshape. ONNX Runtime places the integer nodes on the CPU,
even if all other nodes run on a GPU. In a target, 0 copies the size at the same place of the reshaped value. So a computed
size becomes 0 if it provably is that size, and the node gives the same result for every batch, including an empty batch. A
single size that is not at the same place becomes -1 if the products of the sizes prove it.

onnxscript's ``MaterializeReshapeShape`` does not fit: it trusts declared shapes, and writes -1 without comparing products.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bnexport.onnx_files.models import (
    MAX_SIZES,
    Names,
    attributes,
    for_inference,
    inferred_graph,
    mentions,
    reads,
    refill,
)

#: A number, or the name of a size that varies; equal names are equal sizes.
Size: TypeAlias = int | str
Sizes: TypeAlias = NDArray[Any]
Dims: TypeAlias = dict[str, list[Size]]

_INTEGERS = (TensorProto.INT32, TensorProto.INT64)
#: Number of inferences: each finds the shapes after one more computed target that onnx does not follow.
_MAX_ROUNDS = 8
#: Operators that pick or join sizes.
_FOLLOWED = ("Shape", "Identity", "Cast", "Concat", "Gather", "Squeeze", "Unsqueeze", "Reshape", "Slice")


def simplify_reshapes(model: ModelProto) -> int:
    """Give each Reshape of the main graph a constant target if it provably computes the same, and drop dead size nodes.

    The model is valid, and changed in place. The number of changed Reshape nodes is returned.
    """
    constants = _constants(model)
    reshapes = [node for node in model.graph.node if _is(node, "Reshape") and len(node.input) == 2]  # 1 before opset 5
    computed = [node for node in reshapes if node.input[1] not in constants]
    if not computed or any(function.domain in ("", "ai.onnx") for function in model.functions):
        return 0  # a function of the file may have the name of an operator
    known, dims = _sizes_of(model, constants, computed)
    targets = [(node, target) for node in computed if (target := _target(node, known, dims)) is not None]
    before, names = [node.input[1] for node, _ in targets], Names(model)
    for node, target in targets:
        _write(model, node, names.free(node.output[0], "shape"), target)
    _drop_unread(model, before)
    return len(targets)


# --- sizes as numbers and names ---


def _sizes_of(
    model: ModelProto, constants: Mapping[str, Sizes], computed: Sequence[NodeProto]
) -> tuple[dict[str, Sizes], Dims]:
    """Return the short integer values that are sizes, and the shapes of all values, as far as they are known.

    onnx's inference does not follow sizes through every operator. So the shapes that the targets themselves state are added,
    and inference is repeated until nothing new is found.
    """
    bare = _without_claims(model)
    stated: dict[str, list[Size]] = {}
    for _ in range(_MAX_ROUNDS):
        inferred = inferred_graph(bare)
        dims = _dims(inferred)
        known = dict(constants)
        for node in model.graph.node:
            if len(node.output) == 1 and (value := _sizes(node, known, dims)) is not None and value.size <= MAX_SIZES:
                known[node.output[0]] = value
        shapes = {node.output[0]: shape for node in computed if (shape := _stated(node, known, dims)) is not None}
        if shapes == stated:
            break
        stated = shapes
        types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
        del bare.graph.value_info[:]
        bare.graph.value_info.extend(
            helper.make_tensor_value_info(name, types[name], shape) for name, shape in shapes.items() if name in types
        )
    return known, dims


def _stated(node: NodeProto, known: Mapping[str, Sizes], dims: Dims) -> list[Size] | None:
    """Return the output shape that a Reshape's target states; None if an entry may mean another size."""
    sizes, own, literal = _resolved(node, known, dims), dims.get(node.input[0], ()), _has_real_zeros(node)
    if sizes is None:
        return None
    fits = (
        size > 0 if isinstance(size, int) else literal or (at < len(own) and own[at] == size)
        for at, size in enumerate(sizes)
    )
    return sizes if all(fits) else None


def _without_claims(model: ModelProto) -> ModelProto:
    """Return a copy without large weights and without declared shapes of inner values and outputs, which may be wrong."""
    bare = for_inference(model)
    del bare.graph.value_info[:]
    for value in bare.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and not dim.dim_param:
                dim.dim_param = f"{value.name}\0{axis}"
    return bare


def _dims(graph: GraphProto) -> Dims:
    found: Dims = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.output, *graph.input):
        if value.type.tensor_type.HasField("shape"):
            found[value.name] = [
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}\0{axis}"
                for axis, dim in enumerate(value.type.tensor_type.shape.dim)
            ]
    return found


def _constants(model: ModelProto) -> dict[str, Sizes]:
    """Return the short integer constants by name, without initializers that a caller may replace."""
    replaceable = {value.name for value in model.graph.input} if model.ir_version >= 4 else set()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in replaceable}
    found = {}
    for name, tensor in tensors.items():
        if tensor.data_type in _INTEGERS and math.prod(tensor.dims) <= MAX_SIZES:
            found[name] = _numbers(numpy_helper.to_array(tensor))
    for node in model.graph.node:
        for item in node.attribute if _is(node, "Constant") else ():
            if item.name in ("value_int", "value_ints"):
                found[node.output[0]] = _numbers(np.array(helper.get_attribute_value(item)))
            elif item.name == "value" and item.t.data_type in _INTEGERS and math.prod(item.t.dims) <= MAX_SIZES:
                found[node.output[0]] = _numbers(numpy_helper.to_array(item.t))
    return found


def _numbers(array: NDArray[Any]) -> Sizes:
    return np.array(array.tolist(), dtype=object)


def _sizes(node: NodeProto, known: Mapping[str, Sizes], dims: Dims) -> Sizes | None:
    """Return the sizes that a node picks or joins from sizes; None for other operations."""
    if node.op_type not in _FOLLOWED or node.domain not in ("", "ai.onnx"):
        return None
    options = attributes(node)
    if node.op_type == "Shape":
        sizes = dims.get(node.input[0])
        return None if sizes is None else np.array(sizes[options.get("start", 0) : options.get("end")], dtype=object)
    values = [known[name] for name in node.input if name in known]
    if not values or len(values) < len(node.input) or values[0].ndim > 1:
        return None
    data, *rest = values
    if node.op_type in ("Gather", "Reshape") and not rest:
        return None
    if node.op_type == "Identity" or (node.op_type == "Cast" and options.get("to") in _INTEGERS):
        return data
    if node.op_type == "Concat":
        return np.concatenate([data, *rest]) if all(item.ndim == 1 for item in (data, *rest)) else None
    if node.op_type == "Gather":
        return _picked(data, rest[0])
    if node.op_type == "Squeeze":
        return data.reshape(()) if data.size == 1 else None
    if node.op_type == "Unsqueeze":
        return data.reshape(1) if data.ndim == 0 else None
    if node.op_type == "Reshape":
        return data.reshape(-1) if rest[0].tolist() == [-1] else None
    if node.op_type == "Slice":
        return _cut(data, options, rest)
    return None


def _picked(data: Sizes, index: Sizes) -> Sizes | None:
    if data.ndim != 1 or index.ndim > 1:
        return None
    inside = all(isinstance(at, int) and -len(data) <= at < len(data) for at in index.flat)
    return np.array(data[index.astype(np.int64)], dtype=object) if inside else None


def _cut(data: Sizes, options: Mapping[str, Any], rest: Sequence[Sizes]) -> Sizes | None:
    """Return a slice; its places are attributes before opset 10, and inputs from opset 10."""
    keys = ("starts", "ends", "axes", "steps")
    given = dict(zip(keys, [list(item.flat) for item in rest], strict=False)) if rest else options
    parts = [given.get(key, default) for key, default in zip(keys, (None, None, [0], [1]), strict=True)]
    if data.ndim != 1 or any(part is None or len(part) != 1 or not isinstance(part[0], int) for part in parts):
        return None
    start, end, _, step = (part[0] for part in parts if part is not None)
    return np.array(data[start:end:step], dtype=object) if step else None


# --- the constant target ---


def _target(node: NodeProto, known: Mapping[str, Sizes], dims: Dims) -> list[int] | None:
    """Return the constant target that provably computes the same; None without a proof."""
    sizes, own = _resolved(node, known, dims), dims.get(node.input[0], ())
    if sizes is None:
        return None
    varying = {at: size for at, size in enumerate(sizes) if isinstance(size, str)}
    if all(at < len(own) and own[at] == size for at, size in varying.items()):
        return [0 if isinstance(size, str) else size for size in sizes]
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(varying) == 1 and all(size > 0 for size in numbers) and _product(own) == _product(sizes):
        return [-1 if isinstance(size, str) else size for size in sizes]
    return None


def _resolved(node: NodeProto, known: Mapping[str, Sizes], dims: Dims) -> list[Size] | None:
    """Return the target with its 0 and -1 replaced by their sizes; a -1 of an unknown size stays.

    Next to a batch of 0 a -1 is ambiguous, and engines refuse it; a number is unambiguous.
    """
    if node.input[1] not in known or known[node.input[1]].ndim != 1:
        return None
    sizes: list[Size] = list(known[node.input[1]])
    own = dims.get(node.input[0], [])
    if 0 in sizes:
        if _has_real_zeros(node) or len(own) < len(sizes):
            return None
        sizes = [own[at] if size == 0 else size for at, size in enumerate(sizes)]
    if own and sizes.count(-1) == 1:
        (all_of_it, names), (others, named) = _product(own), _product([size for size in sizes if size != -1])
        if names == named and others > 0 and all_of_it and all_of_it % others == 0:
            sizes[sizes.index(-1)] = all_of_it // others
    return sizes


def _product(sizes: Sequence[Size]) -> tuple[int, Counter[str]]:
    """Return the product of sizes: its number, and how often each varying size is a factor."""
    numbers = math.prod(size for size in sizes if isinstance(size, int))
    return numbers, Counter(size for size in sizes if isinstance(size, str))


# --- writing ---


def _write(model: ModelProto, node: NodeProto, name: str, target: Sequence[int]) -> None:
    tensor = numpy_helper.from_array(np.array(target, dtype=np.int64), name)
    if model.ir_version >= 4:
        model.graph.initializer.append(tensor)
    else:  # every initializer would have to be an input too
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
    node.input[1] = name
    refill(node.attribute, [item for item in node.attribute if item.name != "allowzero"])


def _drop_unread(model: ModelProto, names: Sequence[str]) -> None:
    """Remove the nodes and initializers that compute some values if they are no longer read."""
    graph = model.graph
    count, producers = mentions(graph), {name: node for node in graph.node for name in node.output if name}
    inputs = {value.name for value in graph.input}
    waiting, gone = list(names), set()
    while waiting:
        name = waiting.pop()
        if count[name] or name in gone or name in inputs:
            continue
        node = producers.get(name)
        if node is None:
            gone.add(name)
        elif not any(count[output] for output in node.output):
            gone.update(node.output)
            count.subtract(reads(node))
            waiting += reads(node)
    for at, item in reversed(list(enumerate(graph.node))):
        if gone.issuperset(item.output) and item.output:
            del graph.node[at]
    for group in (graph.initializer, graph.value_info):
        for at, item in reversed(list(enumerate(group))):
            if item.name in gone:
                del group[at]


def _has_real_zeros(node: NodeProto) -> bool:
    return any(item.name == "allowzero" and item.i for item in node.attribute)


def _is(node: NodeProto, operator: str) -> bool:
    return node.op_type == operator and node.domain in ("", "ai.onnx")
