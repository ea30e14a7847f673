"""Conversion of other exporters' ONNX files to the form that the checker, the float64 evaluator and the readers expect.

``NORMALISATIONS`` changes the spelling of a file, never its results: ONNX Runtime computes the same before and after. This was
checked with ONNX Runtime 1.31: it sorts nodes, infers types of outputs, and treats a negative size as unknown. Before operator
set 14, five *named* outputs of a BatchNormalization mean training mode to it, so these outputs stay.

``upgraded`` and ``split_sums`` rewrite operators. The proof of a fold compares the result with the file before these changes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.version_converter import convert_version

from bnexport.errors import ModelError
from bnexport.onnx_files.models import Names, graphs, mentions, nodes, opset_of, reads, refill
from bnexport.optional import one_line

#: Older operator sets broadcast by an attribute, and their BatchNormalization has another attribute for training.
OLDEST_OPSET = 7
#: The first operator set whose BatchNormalization has the attribute training_mode; before it, more outputs mean training.
_TRAINING_MODE = 14
#: The first format in which an initializer that is not listed as an input is a constant.
_CONSTANTS_UNLISTED = 4
#: Operators that broadcast by the attribute axis before operator set 7.
_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less")
#: A number for an unknown size during a conversion.
_SIZE = 224
#: Operators that are in training mode before operator set 7 unless is_test is set.
_IS_TEST = ("BatchNormalization", "Dropout")
#: Operator -> places of its weights among the inputs.
_WEIGHTS = {
    "BatchNormalization": (1, 2, 3, 4),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
}


@dataclass(frozen=True)
class Normalisation:
    """One change of a file's spelling."""

    name: str  # Noun phrase for messages
    apply: Callable[[ModelProto], bool]  # Changes a model in place, and returns True if anything changed


def normalise(model: ModelProto) -> tuple[str, ...]:
    """Bring a model into the common form, in place, and return the names of the rows that changed something."""
    return tuple(row.name for row in NORMALISATIONS if row.apply(model))


# --- the rows ---------------------------------------------------------------------------------------------------------


def _default_domain(model: ModelProto) -> bool:
    """Replace the domain ``ai.onnx`` by the empty domain; two imports of one version become one."""
    owners: list[Any] = [model, *model.functions]
    spelt = [item for owner in owners for item in owner.opset_import if item.domain == "ai.onnx"]
    spelt += [item for item in (*nodes(model), *model.functions) if item.domain == "ai.onnx"]
    for item in spelt:
        item.domain = ""
    for owner in owners if spelt else ():
        for version in {item.version for item in owner.opset_import if not item.domain}:
            while [(item.domain, item.version) for item in owner.opset_import].count(("", version)) > 1:
                owner.opset_import.remove(helper.make_opsetid("", version))
    return bool(spelt)


def _graph_names(model: ModelProto) -> bool:
    unnamed = [graph for graph in graphs(model) if not graph.name]
    for graph in unnamed:
        graph.name = "graph"
    return bool(unnamed)


def _unknown_sizes(model: ModelProto) -> bool:
    """Drop sizes of 0 and below, and the name "?", which Paddle's exporter gives to every unknown size."""
    found = False
    for graph in graphs(model):
        stored = {tensor.name for tensor in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim if value.name not in stored else ():
                if (dim.HasField("dim_value") and dim.dim_value <= 0) or dim.dim_param == "?":
                    dim.Clear()
                    found = True
    return found


def _node_order(model: ModelProto) -> bool:
    """Put every node after those that it reads; a cycle stays, and the checker refuses it."""
    owners: list[Any] = [*graphs(model), *model.functions]
    return sum(_sort(owner.node) for owner in reversed(owners)) > 0  # the inner ones first: sorting copies nodes


def _sort(group: Any) -> bool:
    """Sort nodes in the order in which they run, otherwise in their present order; return True if the order changed."""
    given = list(group)
    makers = {name: index for index, node in enumerate(given) for name in node.output if name}
    before = [{makers[name] for name in reads(node) if name in makers} for node in given]
    if all(max(known, default=-1) < index for index, known in enumerate(before)):
        return False
    readers: list[list[int]] = [[] for _ in given]
    for index, known in enumerate(before):
        for maker in known:
            readers[maker].append(index)
    waiting = [len(known) for known in before]
    ready, order = [index for index, count in enumerate(waiting) if not count], []
    while ready:
        order.append(index := heapq.heappop(ready))
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(given):
        return False
    refill(group, [given[index] for index in order])
    return True


def _batch_norm_outputs(model: ModelProto) -> bool:
    """Drop outputs of a BatchNormalization without a meaning: those without a name, and unread ones outside of training."""
    found, count, opset = False, mentions(model.graph), opset_of(model)
    for node in _batch_norms(model):
        training = any(item.name == "training_mode" and item.i for item in node.attribute)
        while len(node.output) > 1:
            last = node.output[-1]
            if last and (opset < _TRAINING_MODE or training or count[last]):
                break
            del node.output[-1]
            found = True
    return found


def _spatial(model: ModelProto) -> bool:
    """Drop ``spatial=0`` of a BatchNormalization with one number per channel, which has no statistics for each position.

    MXNet's exporter writes these files, and its own runtime normalised each channel. ONNX Runtime refuses the files.
    """
    found = False
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    for node in _batch_norms(model):
        spatial = next((item for item in node.attribute if item.name == "spatial" and not item.i), None)
        if spatial is not None and all(ranks.get(name) == 1 for name in node.input[1:5]):
            node.attribute.remove(spatial)
            found = True
    return found


def _output_types(model: ModelProto) -> bool:
    """Give outputs without a type the type and shape that shape inference finds."""
    untyped = [value for value in model.graph.output if not _is_typed(value)]
    if not untyped:
        return False
    bare = deepcopy(model)
    del bare.graph.output[:]
    bare.graph.output.extend(value for value in model.graph.output if _is_typed(value))
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    except Exception:  # onnx raises several classes; the checker then reports the fault
        return False
    types = {value.name: value.type for value in (*inferred.value_info, *inferred.input)}
    for value in untyped:
        if value.name in types:
            value.type.CopyFrom(types[value.name])
    return any(map(_is_typed, untyped))


def _is_typed(value: ValueInfoProto) -> bool:
    kind = value.type.WhichOneof("value")
    return kind is not None and (kind != "tensor_type" or value.type.tensor_type.elem_type != TensorProto.UNDEFINED)


def _listed_initializers(model: ModelProto) -> bool:
    """Treat initializers as constants if a file lists every one as an input, as exporters for the old format do.

    A file that lists some of its initializers lets a caller replace these on purpose, so they stay inputs.
    """
    if model.ir_version < _CONSTANTS_UNLISTED:
        return False  # the format demands the listing
    inputs = {value.name for value in model.graph.input}
    stored = {tensor.name for tensor in model.graph.initializer}
    weights = {node.input[at] for node in nodes(model) for at in _WEIGHTS.get(node.op_type, ()) if at < len(node.input)}
    if not weights & stored or not stored <= inputs:
        return False
    refill(model.graph.input, [value for value in model.graph.input if value.name not in stored])
    return True


#: Every normalisation, in the order in which they are applied.
NORMALISATIONS: tuple[Normalisation, ...] = (
    Normalisation("the domain ai.onnx, written as the empty one", _default_domain),
    Normalisation("graphs without a name", _graph_names),
    Normalisation("sizes of 0 and below, treated as unknown", _unknown_sizes),
    Normalisation("nodes that were not in the order in which they run", _node_order),
    Normalisation("outputs of BatchNormalization without a name or a reader", _batch_norm_outputs),
    Normalisation("spatial=0 with one number per channel", _spatial),
    Normalisation("outputs without a type", _output_types),
    Normalisation("initializers that were all listed as inputs, treated as constants", _listed_initializers),
)


def _batch_norms(model: ModelProto) -> Iterator[NodeProto]:
    return (node for node in model.graph.node if node.op_type == "BatchNormalization" and not node.domain)


# --- rewriting of operators -------------------------------------------------------------------------------------------


def upgraded(model: ModelProto, name: str, to: int = OLDEST_OPSET) -> ModelProto:
    """Return a model of operator set ``to`` or newer: the same, or converted by onnx.

    A ModelError refuses an operator in training mode, which the converter would drop.
    """
    opset = opset_of(model)
    if opset >= to:
        return model
    remedy = f"Export the network again with operator set {to} or newer"
    for node in nodes(model) if opset < OLDEST_OPSET else ():
        if node.op_type in _IS_TEST and not any(item.name == "is_test" and item.i for item in node.attribute):
            raise ModelError(
                f"{name} uses operator set {opset}, and its {node.op_type} ({node.name or node.output[0]}) is in training"
                " mode (is_test=0)",
                remedy=remedy,
            )
    try:
        converted = _with_numbers(model)
        for version in range(opset + 1, to + 1):  # one by one: shapes are inferred before each
            if version == OLDEST_OPSET:
                converted = _aligned(converted)
            converted = convert_version(converted, version)
        _declare_as(model, converted)
        onnx.checker.check_model(converted)
    except Exception as error:  # the converter's and the checker's errors share no base class
        raise ModelError(
            f"{name} uses operator set {opset}, and onnx.version_converter can't convert it to {to}:"
            f" {one_line(error, 160)}",
            remedy=remedy,
        ) from error
    return converted


def _with_numbers(model: ModelProto) -> ModelProto:
    """Return a copy whose inputs have numbers for sizes, because the converter does not support names."""
    copy = deepcopy(model)
    for value in copy.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_value = _SIZE if axis else 1
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    del copy.graph.value_info[:]
    return copy


def _aligned(model: ModelProto) -> ModelProto:
    """Replace the axis at which an old operator starts to broadcast by explicit axes: onnx 1.23 converts it to one too many."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input):
        if value.type.tensor_type.HasField("shape"):
            ranks[value.name] = len(value.type.tensor_type.shape.dim)
    names, aligned = Names(model), []
    for node in model.graph.node:
        axis = next((item for item in node.attribute if item.name == "axis" and node.op_type in _BROADCASTING), None)
        if axis is not None and all(name in ranks for name in node.input):
            left, right = (ranks[name] for name in node.input)
            missing = range(right, left - axis.i % left)
            if missing:
                placed = names.free(node.input[1], "placed")
                aligned.append(helper.make_node("Unsqueeze", [node.input[1]], [placed], axes=list(missing)))
                node.input[1] = placed
            node.attribute.remove(axis)
        aligned.append(node)
    refill(model.graph.node, aligned)
    return model


def _declare_as(model: ModelProto, converted: ModelProto) -> None:
    """Restore the declarations of a converted model's inputs and outputs."""
    for ours, theirs in ((model.graph.input, converted.graph.input), (model.graph.output, converted.graph.output)):
        declared = {value.name: value for value in ours}
        for value in theirs:
            if value.name in declared:
                value.CopyFrom(declared[value.name])
    del converted.graph.value_info[:]


@dataclass(frozen=True)
class SplitSum:
    """A Sum of more than two values that became a chain of Adds."""

    node: NodeProto  # The original Sum
    inner: frozenset[str]  # Names of the values between the Adds


def split_sums(model: ModelProto) -> tuple[SplitSum, ...]:
    """Replace each Sum of three and more values by a chain of Adds, in place; ``join_sums`` reverses this."""
    if any(function.name in ("Sum", "Add") and not function.domain for function in model.functions):
        return ()
    found: list[SplitSum] = []
    names, rewritten = Names(model), []
    for node in model.graph.node:
        if node.op_type != "Sum" or node.domain or len(node.input) < 3:
            rewritten.append(node)
            continue
        total, inner = node.input[0], []
        for place, value in enumerate(node.input[1:], 2):
            last = place == len(node.input)
            output = node.output[0] if last else names.free(node.output[0], "partial")
            label = node.name if last or not node.name else names.free(node.name, "partial")
            rewritten.append(helper.make_node("Add", [total, value], [output], name=label))
            inner += [] if last else [output]
            total = output
        found.append(SplitSum(deepcopy(node), frozenset(inner)))
    if found:
        refill(model.graph.node, rewritten)
    return tuple(found)


def join_sums(model: ModelProto, sums: tuple[SplitSum, ...]) -> None:
    """Replace the Adds that remain after folding by their Sums, in place."""
    for split in sums:
        makers = {name: node for node in model.graph.node for name in node.output}
        last = makers.get(split.node.output[0])
        if last is None or last.op_type != "Add":
            continue
        removed, values, stack = [last.output[0]], [], list(reversed(last.input))
        while stack:
            name = stack.pop()
            if name not in split.inner or makers[name].op_type != "Add":
                values.append(name)
                continue
            removed.append(name)
            stack += reversed(makers[name].input)
        if len(values) < 3:
            continue
        joined = deepcopy(split.node)
        del joined.input[:]
        joined.input.extend(values)
        rest = [node for node in model.graph.node if not set(node.output) & set(removed[1:])]
        refill(model.graph.node, [joined if node is last else node for node in rest])
